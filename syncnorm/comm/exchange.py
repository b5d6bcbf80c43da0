"""The one kind of message: float64 numbers, summed over the workers of a group.

Every exchange of the library passes through here, where it is counted and timed.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._library.effects import EffectType

from syncnorm.comm import groups


class Exchange(NamedTuple):
    """One message as its sender saw it."""

    kind: str
    """What it carried: "moments", "gradients", "second" (derivatives), "fault", "count"; "all moments", "all
    gradients" of a model; "population" of `recalibrate`, "monitor" of `monitor`."""
    numel: int
    """How many float64 numbers."""
    seconds: float
    """How long the caller was held up (on CUDA: the time to enqueue it)."""


_records: list[list[Exchange]] = []


@contextmanager
def record() -> Iterator[list[Exchange]]:
    """Collect the exchanges that this process makes within the block, in order.

    >>> with record() as exchanges:
    ...     pass
    >>> len(exchanges)
    0
    """
    exchanges: list[Exchange] = []
    _records.append(exchanges)
    try:
        yield exchanges
    finally:
        # By identity: two lists of equal content are not the same record.
        _records[:] = [r for r in _records if r is not exchanges]


@dataclass
class Total:
    """What the exchanges of one kind add up to."""

    count: int = 0
    numbers: int = 0
    """How many float64 numbers."""
    seconds: float = 0.0
    """How long the caller was held up, waiting for sums under way included (on CUDA: the time to enqueue)."""

    def add(self, count: int, numbers: int, seconds: float) -> None:
        self.count += count
        self.numbers += numbers
        self.seconds += seconds


class Tally:
    """Adds up the exchanges that this process makes, by kind, for as long as the tally lives."""

    def __init__(self) -> None:
        self._totals: dict[str, Total] = {}
        _tallies.add(self)

    def add(self, kind: str, count: int, numbers: int, seconds: float) -> None:
        self._totals.setdefault(kind, Total()).add(count, numbers, seconds)

    def take(self) -> dict[str, Total]:
        """The totals by kind since the last call."""
        totals, self._totals = self._totals, {}
        return totals


_tallies: weakref.WeakSet[Tally] = weakref.WeakSet()


def sum_(message: Tensor, group: groups.Group | groups.Named | None, kind: str) -> Tensor:
    """Replace `message` (float64) by its sum over `group`, the same bits on every worker. None: nothing to do.

    *Collectives*: one all-reduce of `message.numel()` float64 numbers; every member of `group` must call. In code
    that is being compiled the message goes out when the code runs.
    """
    if group is None:
        return message
    if isinstance(group, groups.Named):
        return message.copy_(_sum(message, group.name, kind))
    assert message.dtype == torch.float64
    start = time.perf_counter()
    dist.all_reduce(message, group=group)
    _note(kind, message, start)
    return message


@torch.library.custom_op("syncnorm::sum", mutates_args=())
def _sum(message: Tensor, group: str, kind: str) -> Tensor:
    """`sum_` as an operator that a compiler puts into its graph: counted and timed when the graph runs."""
    return sum_(message.clone(), groups.look_up(groups.Named(group)), kind)


@_sum.register_fake
def _(message: Tensor, group: str, kind: str) -> Tensor:
    return torch.empty_like(message)


# Left out nowhere and in the order of the program, on all workers alike: also where nobody needs the result, and
# where workers have compiled for different shapes.
_sum.register_effect(EffectType.ORDERED)


class Pending:
    """A sum under way. Copies and pickles as its result."""

    def __init__(self, message: Tensor, work: dist.Work | None, kind: str) -> None:
        self._message = message
        self._work = work
        self._kind = kind

    def wait(self) -> Tensor:
        """The sum over the group; on CUDA ordered before what the current stream does next."""
        if self._work is not None:
            start = time.perf_counter()
            self._work.wait()
            self._work = None
            for tally in _tallies:
                tally.add(self._kind, 0, 0, time.perf_counter() - start)
        return self._message

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_message": self.wait(), "_work": None}


def start_sum(message: Tensor, group: dist.ProcessGroup | None, kind: str) -> Pending:
    """Begin to sum `message` (float64) over `group`; it must be left alone until waited for.

    *Collectives*: one asynchronous all-reduce of `message.numel()` float64 numbers; every member must call.
    """
    if group is None:
        return Pending(message, None, kind)
    assert message.dtype == torch.float64
    start = time.perf_counter()
    work = dist.all_reduce(message, group=group, async_op=True)
    _note(kind, message, start)
    return Pending(message, work, kind)


def gather(message: Tensor, group: dist.ProcessGroup | None, kind: str) -> Tensor:
    """The messages of all workers, stacked by rank: shape (world size, *message.shape)."""
    if group is None:
        return message.unsqueeze(0)
    start = time.perf_counter()
    parts = [torch.empty_like(message) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, message, group=group)
    _note(kind, message, start)
    return torch.stack(parts)


def _note(kind: str, message: Tensor, start: float) -> None:
    done = Exchange(kind, message.numel(), time.perf_counter() - start)
    for exchanges in _records:
        exchanges.append(done)
    for tally in _tallies:
        tally.add(kind, 1, done.numel, done.seconds)
