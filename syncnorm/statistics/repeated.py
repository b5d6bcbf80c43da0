"""Training forwards that activation checkpointing repeats in the backward pass.

A repetition must see what the first forward saw, and change nothing: it takes the statistic that
was kept, exchanges nothing and updates nothing. So workers may differ in what they repeat.

A statistic is kept by the checkpoint, which is an object of torch's that lives as long as it may be
repeated (see `syncnorm.undocumented.checkpoints`). A repetition runs the same calls of a layer in
the same order, so the checkpoint and the place in that order say which call it is: no value is
looked at, and nothing depends on what only one worker knows. A layer keeps nothing itself, so that
copies and pickles have none of it.

A forward inside a backward pass that is in no checkpoint known to it is made like any other,
with its exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import nn

from syncnorm import undocumented
from syncnorm.recomputing import is_recomputing, may_be_repeated


class Repeatable(Protocol):
    """What a call of a layer saw: all that a repetition needs of it."""

    def for_repetition(self) -> Self:
        """The same, for a repetition of the call, which belongs to no step."""
        ...


R = TypeVar("R", bound=Repeatable)
T = TypeVar("T")

# Under this name a checkpoint has what its layers saw.
_CALLS = "_syncnorm_calls"


@dataclass
class _Calls:
    """The calls of one layer in one checkpoint."""

    statistics: list[Any] = field(default_factory=list)
    backward_pass: int | None = None
    """The backward pass that has repeated some of them last."""
    repeated: int = 0
    """The number of them that it has repeated."""


def begin(layer: nn.Module, first: Callable[[], R]) -> tuple[R, bool]:
    """Call `first`, which exchanges and updates, unless this forward repeats one that has.

    Returns:
        What the call saw, and True if this is a repetition, which is to change nothing.
    """
    is_repeated = is_recomputing()
    kept = find(layer) if is_repeated else None
    if kept is not None:
        return kept, True
    seen = first()
    if not (is_repeated or torch.compiler.is_compiling()) and may_be_repeated():
        keep(layer, seen)
    return seen, False


@dataclass(frozen=True)
class _Value(Generic[T]):
    value: T

    def for_repetition(self) -> Self:
        return self


def same(layer: nn.Module, first: Callable[[], T]) -> T:
    """Call `first`, unless this forward repeats one that has: then give what it gave.

    A value that is kept must have no graph, and nobody may change it in place.
    """
    kept, _ = begin(layer, lambda: _Value(first()))
    return kept.value


def keep(layer: nn.Module, statistic: Repeatable) -> None:
    """Keep the statistic of a first forward in all checkpoints that it runs in."""
    _add(layer, statistic, [each for each, is_again in undocumented.checkpoints() if not is_again])


def find(layer: nn.Module) -> Any | None:
    """The statistic of the forward that the present one repeats; None if that is not known.

    A checkpoint within the repeated one, which is a new object each time, keeps it again.
    """
    within: list[Any] = []
    for each, is_again in undocumented.checkpoints():
        if not is_again:
            within.append(each)
            continue
        calls: _Calls | None = getattr(each, _CALLS, {}).get(layer)
        if calls is None:
            return None
        now = undocumented.backward_pass()
        if calls.backward_pass != now:
            calls.backward_pass, calls.repeated = now, 0
        if calls.repeated == len(calls.statistics):
            return None
        statistic = calls.statistics[calls.repeated]
        calls.repeated += 1
        _add(layer, statistic, within)
        return statistic
    return None


def _add(layer: nn.Module, statistic: Repeatable, checkpoints: list[Any]) -> None:
    if not checkpoints:
        return
    again = statistic.for_repetition()
    for each in checkpoints:
        if not hasattr(each, _CALLS):
            setattr(each, _CALLS, {})
        getattr(each, _CALLS).setdefault(layer, _Calls()).statistics.append(again)
