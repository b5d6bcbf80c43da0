"""The loss of a batch as a task gives it, checked."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from syncnorm.errors import ConfigError
from syncnorm.train.task import Model, Number, Task

# The name of the only term of a loss that is a single pair.
WHOLE = ""


def loss_terms(task: Task, model: Model, batch: Any) -> dict[str, tuple[Tensor, Number]]:
    """Compute the sum and the count of each term of a batch's loss.

    Raises:
        ConfigError: the task gives something else.
    """
    result: Any = task.loss(model, batch)
    terms = result if isinstance(result, Mapping) else {WHOLE: result}
    for name, pair in terms.items():
        if not isinstance(name, str):
            raise ConfigError(
                f"`task.name` must give the terms of a loss names, got {name!r} {_describe(name)}"
            )
        _check(pair)
    if not terms:
        raise ConfigError("`task.name` must give a loss of at least one term, got an empty mapping")
    return dict(terms)


def needs_whole_step(task: Task, terms: Mapping[str, Any]) -> bool:
    """Return True if a worker's part of a step must not be cut into several forwards.

    A loss of several terms divides each by its count over the whole step, which later forwards
    would still add to. A loss that looks across the batch says so by an attribute of the task,
    `needs_whole_step = True`.
    """
    return terms.keys() != {WHOLE} or bool(getattr(task, "needs_whole_step", False))


def _check(pair: Any) -> None:
    expected = "`task.name` must give the loss as a sum, of shape (), and its count, got "
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ConfigError(f"{expected}a {type(pair).__name__}")
    total, count = pair
    if not isinstance(total, Tensor) or total.ndim or not total.is_floating_point():
        raise ConfigError(f"{expected}the sum {_describe(total)}")
    if not isinstance(count, Tensor | int | float) or (isinstance(count, Tensor) and count.ndim):
        raise ConfigError(f"{expected}the count {_describe(count)}")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"of shape {tuple(value.shape)} and type {value.dtype}"
    return f"of type {type(value).__name__}"
