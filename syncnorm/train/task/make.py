"""The task that a configuration names."""

from typing import Any

import torch
from torch import nn

from syncnorm.errors import ConfigError
from syncnorm.train.config.callables import call
from syncnorm.train.config.schema import TaskSection
from syncnorm.train.config.section import REFERENCE
from syncnorm.train.task import Task
from syncnorm.train.task.builtin import make_builtin
from syncnorm.train.task.meters import Meters
from syncnorm.train.task.supervised import Supervised


def make_task(
    section: TaskSection,
    device: torch.device,
    dtype: torch.dtype,
    num_classes: int | None = None,
    allowed: tuple[str, ...] = (),
) -> Task:
    """Build a task.

    Args:
        section: its name and options.
        device: of the batches.
        dtype: of their floating tensors.
        num_classes: of the data, if it is known.
        allowed: packages whose callables the configuration may name.

    Raises:
        ConfigError: a callable may not be called, or returns something else.
    """
    if not REFERENCE.fullmatch(section.name):
        task = make_builtin(section.name, section.loss, section.options)
        if isinstance(task, Supervised):
            task.classes = num_classes
            _place(task, device, dtype)
            if section.metrics:
                task.meters = Meters(section.metrics, device)
        task.best = task.best if section.best is None else section.best
        return task
    made: Any = call("task", section.name, allowed, **section.options)
    missing = [name for name in ("loss", "metrics") if not callable(getattr(made, name, None))]
    missing += [] if isinstance(getattr(made, "best", None), str) else ["best"]
    if missing:
        raise ConfigError(
            "`task.name` must return an object with methods loss(model, batch) and metrics(model, "
            f"batch), and a name `best`, see syncnorm.train.task.Task; that of "
            f"{section.name!r}, a {type(made).__name__}, lacks {', '.join(missing)}"
        )
    if section.best is not None:
        made.best = section.best
    if isinstance(made, Supervised):
        _place(made, device, dtype)
    return made


def _place(task: Supervised, device: torch.device, dtype: torch.dtype) -> None:
    """Put the weights of a task's loss where outputs are, in their type."""
    if isinstance(task.criterion, nn.Module):
        task.criterion.to(device, dtype)
