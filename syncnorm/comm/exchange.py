"""The one kind of message: float64 numbers, summed over the workers of a group.

Every exchange of the library passes through here, where it is counted and timed.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._library.effects import EffectType

from syncnorm.comm import guard
from syncnorm.comm.flight import Flight
from syncnorm.comm.signing import NO_DATA, Signing

__all__ = ["NO_DATA", "Exchange", "Pending", "Tally", "Total", "announcers", "gather", "record", "start_sum", "sum_"]


class Exchange(NamedTuple):
    """One message as its sender saw it."""

    kind: str
    """What it carried: "moments", "gradients", "second" (derivatives), "fault", "count"; "all moments", "all
    gradients" of a model; "population" of `recalibrate`, "monitor" of `monitor`, "agreement" before anything is
    pooled, "join" of `join`; "no data" for a worker's answer there."""
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


Announce = Callable[[str, Tensor, dist.ProcessGroup], None]
announcers: list[Announce] = []
"""Called before each exchange with "sum" or "gather", the message and the group (see `syncnorm.model.join`)."""


class Named(NamedTuple):
    """A group in code that is being compiled: `groups.look_up` finds it by name whenever the compiled code runs.

    Groups may have been made, or made anew, since.
    """

    name: str


def sum_(message: Tensor, group: dist.ProcessGroup | Named | None, kind: str, name: str = "") -> Tensor:
    """Replace `message` (float64) by its sum over `group`, the same bits on every worker. None: nothing to do.

    *Collectives*: one all-reduce of `message.numel()` float64 numbers; every member of `group` must call. In code
    that is being compiled the message goes out when the code runs.

    Args:
        message: float64, left alone where it has gone.
        group: the workers.
        kind: what it carries, see `Exchange`.
        name: the layer, for errors.

    Raises:
        ExchangeError: it broke, or in debug mode: a worker is somewhere else, or not there in time.
    """
    if group is None:
        return message
    if isinstance(group, Named):
        return message.copy_(_sum(message, group.name, kind, name))
    assert message.dtype == torch.float64
    start = time.perf_counter()
    flight = _begin("sum", message, group, kind, name)
    with flight:
        _wait(dist.all_reduce(message, group=group, async_op=guard.is_debug()))
    flight.land(message)
    _note(kind, message, start)
    return message


@torch.library.custom_op("syncnorm::sum", mutates_args=())
def _sum(message: Tensor, group: str, kind: str, name: str) -> Tensor:
    """`sum_` as an operator that a compiler puts into its graph: counted and timed when the graph runs."""
    from syncnorm.comm.groups import look_up  # which imports this module

    return sum_(message.clone(), look_up(group), kind, name)


@_sum.register_fake
def _(message: Tensor, group: str, kind: str, name: str) -> Tensor:
    return torch.empty_like(message)


# Left out nowhere and in the order of the program, on all workers alike: also where nobody needs the result, and
# where workers have compiled for different shapes.
_sum.register_effect(EffectType.ORDERED)


class Pending:
    """A sum under way. Copies and pickles as its result."""

    def __init__(self, message: Tensor, flight: Flight | None) -> None:
        self._message = message
        self._flight = flight

    def wait(self) -> Tensor:
        """The sum over the group; on CUDA ordered before what the current stream does next.

        Raises:
            ExchangeError: as `sum_`.
        """
        if self._flight is not None:
            start = time.perf_counter()
            flight, self._flight = self._flight, None
            with flight:
                _wait(flight.work)
            flight.land(self._message)
            for tally in _tallies:
                tally.add(flight.kind, 0, 0, time.perf_counter() - start)
        return self._message

    def __getstate__(self) -> dict[str, object]:
        return {"_message": self.wait(), "_flight": None}


def start_sum(message: Tensor, group: dist.ProcessGroup | None, kind: str, name: str = "") -> Pending:
    """Begin to sum `message` (float64) over `group`; it must be left alone until waited for.

    *Collectives*: one asynchronous all-reduce of `message.numel()` float64 numbers; every member must call.
    """
    if group is None:
        return Pending(message, None)
    assert message.dtype == torch.float64
    start = time.perf_counter()
    flight = _begin("sum", message, group, kind, name)
    with flight:
        flight.work = dist.all_reduce(message, group=group, async_op=True)
    _note(kind, message, start)
    return Pending(message, flight)


def gather(message: Tensor, group: dist.ProcessGroup | None, kind: str, name: str = "") -> Tensor:
    """The messages of all workers, stacked by rank: shape (world size, *message.shape)."""
    if group is None:
        return message.unsqueeze(0)
    start = time.perf_counter()
    flight = _begin("gather", message, group, kind, name)
    parts = [torch.empty_like(message) for _ in range(dist.get_world_size(group))]
    with flight:
        _wait(dist.all_gather(parts, message, group=group, async_op=guard.is_debug()))
    flight.land(message)
    _note(kind, message, start)
    return torch.stack(parts)


def gather_text(text: str, group: dist.ProcessGroup, kind: str, device: torch.device) -> list[str]:
    """The texts of all workers, by their rank in `group`.

    *Collectives*: two all-gathers, of 1 and of the longest text's bytes / 8 numbers; every member must call.
    """
    # Bytes travel as they are, eight in the place of a number. A last 1 marks the end; what follows is padding.
    data = torch.tensor([*text.encode(), 1], dtype=torch.uint8)
    length = torch.full((1,), -(-data.numel() // 8), dtype=torch.float64, device=device)
    longest = int(gather(length, group, kind).max())
    message = torch.zeros(8 * longest, dtype=torch.uint8)
    message[: data.numel()] = data
    rows = gather(message.view(torch.float64).to(device), group, kind).cpu().view(torch.uint8)
    return [bytes(row.tolist()).rstrip(b"\0")[:-1].decode() for row in rows]


def _begin(op: str, message: Tensor, group: dist.ProcessGroup, kind: str, name: str) -> Flight:
    for announce in announcers:
        announce(op, message, group)
    flight = Flight(message, group, kind, name)
    if guard.is_debug():
        flight.signing = Signing(flight, group)
        with flight:
            flight.signing.reach()
    return flight


def _wait(work: dist.Work | None) -> None:
    """For what has been enqueued (in debug mode, and what was begun); what blocks has been waited for."""
    seconds = guard.debug_timeout_seconds()
    if work is None:
        return
    if guard.is_debug() and seconds is not None:
        work.wait(timedelta(seconds=seconds))
    else:
        work.wait()


def _note(kind: str, message: Tensor, start: float) -> None:
    done = Exchange(kind, message.numel(), time.perf_counter() - start)
    for exchanges in _records:
        exchanges.append(done)
    for tally in _tallies:
        tally.add(kind, 1, done.numel, done.seconds)
