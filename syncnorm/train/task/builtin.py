"""The tasks that come with the package, by name."""

from collections.abc import Mapping
from typing import Any

from syncnorm.train.task import Task
from syncnorm.train.task.own_loss import OwnLoss
from syncnorm.train.task.supervised import Classify, Multilabel, Regress, Segment

TASKS: dict[str, type[Any]] = {
    "classify": Classify,
    "multilabel": Multilabel,
    "segment": Segment,
    "regress": Regress,
    "own_loss": OwnLoss,
}


def make_builtin(name: str, loss: str | None, options: Mapping[str, Any]) -> Task:
    """Build the task `name`.

    Raises:
        ValueError: its loss is not known or refuses the options, or it takes none.
    """
    if TASKS[name] is not OwnLoss:
        return TASKS[name](loss, **options)
    if loss is not None or options:
        raise ValueError("loss and options must be left out with name own_loss")
    return OwnLoss()
