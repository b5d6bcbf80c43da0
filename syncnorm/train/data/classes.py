"""Targets that are classes, looked at sample by sample where they are read.

On a device a class that is not there would be found by the loss alone, which cannot say whose it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from syncnorm.errors import ConfigError
from syncnorm.train.task.builtin import TASKS

if TYPE_CHECKING:
    from syncnorm.train.config.schema import TaskSection


@dataclass(frozen=True)
class Classes:
    """The classes that a sample's target may name.

    Args:
        count: they are from 0 to count - 1.
        ignored: a further one, of targets that do not count.
    """

    count: int
    ignored: int

    def check(self, sample: Any) -> None:
        """Refuse a sample with a class that is not there; targets of other kinds pass.

        Raises:
            ConfigError: it has one.
        """
        target = sample.get("labels") if isinstance(sample, Mapping) else None
        if isinstance(sample, list | tuple) and len(sample) == 2:
            target = sample[1]
        wrong = self._wrong(target)
        if wrong is not None:
            is_map = getattr(target, "ndim", 0) > 0
            hint = "; task.name=segment leaves 255 out" if is_map and wrong == 255 else ""
            raise ConfigError(f"its class must be from 0 to {self.count - 1}, got {wrong}{hint}")

    def _wrong(self, target: Any) -> int | None:
        """Find a class that is not there, in an int, a tensor, or what numpy has of them."""
        if getattr(target, "ndim", None) == 0:
            target = target.item()
        if isinstance(target, int):
            return None if 0 <= target < self.count or target == self.ignored else target
        if not hasattr(target, "__array__"):
            return None
        numbers = torch.as_tensor(target)
        if numbers.is_floating_point() or numbers.is_complex() or not numbers.numel():
            return None
        # Masks are mostly bytes, and all right: a hundredth of the time of the comparisons below.
        numbers = numbers if numbers.dtype == torch.uint8 else numbers.long()
        least, most = numbers.aminmax()
        if least >= 0 and most < self.count:
            return None
        numbers = numbers.long()  # a byte has no -100
        is_wrong = ((numbers < 0) | (numbers >= self.count)) & (numbers != self.ignored)
        return int(numbers[is_wrong][0]) if is_wrong.any() else None


def classes_of(task: "TaskSection", num_classes: int | None) -> Classes | None:
    """Find the classes that a task's targets may name; None if they name none, or are not known."""
    ignored = getattr(TASKS.get(task.name), "ignored", None)
    if ignored is None or num_classes is None:
        return None
    return Classes(num_classes, task.options.get("ignore_index", ignored))
