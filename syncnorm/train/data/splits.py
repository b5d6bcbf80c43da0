"""Data sets of a run that do not lie in memory as tensors: any map-style ones of torch's kind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from syncnorm.errors import ConfigError
from syncnorm.train.data.datasets import hold_out_indices
from syncnorm.train.data.inputs import Inputs


@dataclass(frozen=True)
class Splits:
    """Map-style data sets for training, for testing and, perhaps, for validation.

    Each has `__len__` and `__getitem__(index)`, which returns a sample: a pair (input, target), a
    mapping, or whatever `collate` and the task take. A sample may be changed at random in
    `__getitem__`: torch's, Python's and numpy's random numbers are seeded there by (seed, epoch,
    index), so a sample's changes do not depend on the worker, the loader process or a resumption.

    Args:
        train: the training set.
        test: the test set; None: there is none.
        validation: the validation set; None: `data.validation` may cut one off the training set.
        num_classes: of the targets, for the model; None where that means nothing.
        in_channels: of the inputs, for the model; None where that means nothing.
        collate: makes a batch of a list of samples; None: torch's default_collate.
        unchanged: the training set without random changes, sample by sample the same, for what is
            not training: a validation set that is cut off, the statistics of an average; None:
            `train` itself.
        classes: names of the classes, for predictions.
        inputs: the inputs before the data sets standardised them, so that the model can be used on
            raw ones; None: it takes what the data sets give.
        labels: of the training samples, whole numbers, for `data.regime`; None: those in the
            attribute `targets` of `train`, as torchvision's data sets have it, if there are some.
    """

    train: Dataset[Any]
    test: Dataset[Any] | None = None
    validation: Dataset[Any] | None = None
    num_classes: int | None = None
    in_channels: int | None = None
    collate: Callable[[Sequence[Any]], Any] | None = None
    unchanged: Dataset[Any] | None = None
    classes: Sequence[str] | None = None
    inputs: Inputs | None = None
    labels: Sequence[int] | Tensor | None = None

    def known_labels(self) -> Tensor | None:
        """Return the training samples' labels, (N,), int64; None if they are not known.

        Raises:
            ConfigError: `labels` are given, but are not one whole number for each sample.
        """
        given = getattr(self.train, "targets", None) if self.labels is None else self.labels
        labels, count = _whole_numbers(given), len(cast(Any, self.train))
        if labels is not None and len(labels) == count:
            return labels
        if self.labels is None:
            return None
        raise ConfigError(
            f"`data.name` must return labels that are whole numbers, one for each of {count} "
            f"training samples, got a {type(given).__name__} of {len(self.labels)}"
        )

    def check(self) -> "Splits":
        """Return this; ConfigError unless each part is a data set with samples."""
        parts = {"train": self.train, "test": self.test, "validation": self.validation}
        for name, data in parts.items():
            if data is not None or name == "train":
                _check_part(name, data)
        train, unchanged = cast(Any, self.train), cast(Any, self.unchanged)
        if unchanged is not None and len(unchanged) != len(train):
            raise ConfigError(
                "`data.name` must return as many samples in `unchanged` as in `train`, got "
                f"{len(unchanged)} and {len(train)}"
            )
        return self

    def hold_out(self, share: float) -> "Splits":
        """Set a share of the training set apart for validation, always the same samples.

        Raises:
            ConfigError: it leaves no sample for training or for validation.
        """
        if not share or self.validation is not None:
            return self
        kept, held = hold_out_indices(len(cast(Any, self.train)), share)
        unchanged = self.train if self.unchanged is None else self.unchanged
        labels = self.known_labels()
        return replace(
            self,
            train=Part(self.train, kept),
            validation=Part(unchanged, held),
            unchanged=Part(unchanged, kept),
            labels=None if labels is None else labels[kept],
        )


def _whole_numbers(values: Any) -> Tensor | None:
    """Return a sequence of whole numbers as int64; None if it is none."""
    try:
        numbers = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    if numbers.ndim != 1 or numbers.is_floating_point() or numbers.is_complex():
        return None
    return numbers.long()


def _check_part(name: str, data: Any) -> None:
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise ConfigError(
            f"`data.name` must return data sets with __len__ and __getitem__, got a "
            f"{type(data).__name__} as `{name}`. The order of an iterable one would depend on the "
            "number of workers."
        )
    if len(data) == 0:
        raise ConfigError(f"`data.name` must return data sets with samples, got none in `{name}`")


class Part(Dataset[Any]):
    """Some samples of a training set."""

    def __init__(self, data: Any, indices: Tensor) -> None:
        self._data, self._indices = data, indices

    def __len__(self) -> int:
        return len(self._indices)

    def number(self, index: int) -> int:
        """Return the number of a sample in the whole set."""
        return int(self._indices[index])

    def __getitem__(self, index: int) -> Any:
        return self._data[self.number(index)]
