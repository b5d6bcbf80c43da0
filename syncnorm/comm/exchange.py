"""The one kind of message: float64 numbers, summed over the workers of a group.

Every exchange of the library passes through here, where it is counted and timed.

A sum travels with its identity: behind the numbers stands one that is made of the layer's name and
of what the message carries. The sum of equal identities is a multiple of each of them; that of
unequal ones is none (but for a chance of about 1e-10), and every worker sees that alike. So workers
that are in different layers, or in a forward and a backward pass, raise one error instead of
pooling what does not belong together.
"""

from __future__ import annotations

import functools
import hashlib
import math
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

from syncnorm.comm import debug, groups
from syncnorm.comm import inflight as flights
from syncnorm.comm.consensus import NO_DATA, Signing, at_different_places
from syncnorm.comm.inflight import Flight
from syncnorm.errors import ExchangeError

__all__ = [
    "NO_DATA",
    "Exchange",
    "Pending",
    "Tally",
    "Total",
    "announcers",
    "gather",
    "make_room",
    "record",
    "size_of",
    "start_sum",
    "sum_",
]


class Exchange(NamedTuple):
    """One message as its sender saw it."""

    kind: str
    """What it carried: "moments", "gradients", "second" (derivatives), "fault", "count"; "all
    moments", "all gradients" of a model; "population" of `recalibrate`, "monitor" of `monitor`,
    "agreement" before anything is pooled, "join" of `join`; "no data" for a worker's answer
    there."""
    numel: int
    """How many float64 numbers travel, identity and padding included (see `size_of`)."""
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
    """How long the caller was held up, waiting for sums under way included (on CUDA: the time to
    enqueue).
    """

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
"""Called before each exchange with "sum" or "gather", the message and the group (see
`syncnorm.model.join.join`).
"""


class Named(NamedTuple):
    """A group in code that is being compiled: `groups.look_up` finds it by name whenever the
    compiled code runs.

    Groups may have been made, or made anew, since.
    """

    name: str


def size_of(count: int, room: int = 0) -> int:
    """The size of a message that carries `count` numbers: these, the identity, and padding.

    The sums of a layer's forward (2C+1) and backward pass (2C) travel in the same size: backends
    that are given messages of different sizes abort or hang, and nobody could say why.

    Args:
        count: how many numbers the message carries.
        room: the least size over its group, see `make_room`.
    """
    return max(room, 2 * (count // 2 + 1))


def make_room(group: dist.ProcessGroup | None, count: int) -> None:
    """Have all sums over `group` travel in at least the size of one of `count` numbers.

    Then workers that are in layers of different widths are told so, too. Every member must call,
    with the same count.
    """
    if group is not None:
        line = flights.line_of(group)
        line.room = max(line.room, size_of(count))


def sum_(
    message: Tensor, group: dist.ProcessGroup | Named | None, kind: str, name: str = ""
) -> Tensor:
    """The sum of `message` (float64) over `group`, the same bits on every worker. None: the message
    itself.

    *Collectives*: one all-reduce of `size_of(message.numel(), room)` float64 numbers; every member
    of `group` must call. In code that is being compiled the message goes out when the code runs.

    Args:
        message: float64, left as it is.
        group: the workers.
        kind: what it carries, see `Exchange`.
        name: the layer, for errors and for the identity.

    Raises:
        ExchangeError: it broke; or, on all workers alike, some of them sent something else. (On
            CUDA the latter is looked at in debug mode only. Otherwise the sum is NaN.) In debug
            mode also: one is not there in time.
    """
    if group is None:
        return message
    if isinstance(group, Named):
        return _sum(message, group.name, kind, name)
    start = time.perf_counter()
    flight, wire = _begin_sum(message, group, kind, name)
    with flight:
        _wait(dist.all_reduce(wire, group=group, async_op=debug.is_debug()))
    flight.land(wire)
    _note(kind, wire, start)
    total, is_one = _open(wire, message, kind, name)
    if not is_one:
        raise_mixed(flight, group)
    return total


@functools.lru_cache(maxsize=4096)
def _identity(kind: str, name: str, count: int) -> int:
    """A number of 38 bits: the sum of equal ones is exact in float64 for up to 32768 workers."""
    digest = hashlib.blake2b(f"{count} {kind} of {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 27 | 1 << 37


def _begin_sum(
    message: Tensor, group: dist.ProcessGroup, kind: str, name: str
) -> tuple[Flight, Tensor]:
    """The message as it travels.

    One who only answers sends just zeros, whatever the others mean by it.
    """
    assert message.dtype == torch.float64
    count = message.numel()
    if kind == NO_DATA:
        wire = message
    else:
        tail = size_of(count, flights.line_of(group).room) - count
        wire = torch.cat(
            [message.reshape(-1), message.new_full((tail,), _identity(kind, name, count))]
        )
    return _begin("sum", wire, group, kind, name, count), wire


def _open(wire: Tensor, message: Tensor, kind: str, name: str) -> tuple[Tensor, bool]:
    """The sum of the messages, and whether all of them were of this kind and name, as far as is
    looked at.
    """
    if kind == NO_DATA:
        return wire, True
    count = message.numel()
    total, identity = wire[:count].view(message.shape), _identity(kind, name, count)
    if wire.device.type == "cpu" or debug.is_debug():
        return total, math.fmod(wire[-1].item(), identity) == 0
    is_one = torch.remainder(wire[-1], identity) == 0
    return torch.where(is_one, total, torch.nan), True


def raise_mixed(flight: Flight, group: dist.ProcessGroup) -> None:
    """Find out together who was in which exchange, and raise that everywhere.

    *Collectives*: two all-gathers. Every worker whose sum over `group` was of different messages
    must call.
    """
    texts = gather_text(str(flight), group, "agreement", groups.device_for(group))
    flights.count_anew(group)
    raise ExchangeError(at_different_places(dict(zip(groups.ranks(group), texts, strict=True))))


@torch.library.custom_op("syncnorm::sum", mutates_args=())
def _sum(message: Tensor, group: str, kind: str, name: str) -> Tensor:
    """`sum_` as an operator that a compiler puts into its graph: counted and timed when the graph
    runs.
    """
    from syncnorm.comm.groups import look_up  # which imports this module

    total = sum_(message, look_up(group), kind, name)
    return total.clone() if total is message else total  # an operator's output is no input of it


@_sum.register_fake
def _(message: Tensor, group: str, kind: str, name: str) -> Tensor:
    return torch.empty_like(message)


# Left out nowhere and in the order of the program, on all workers alike: also where nobody needs
# the result, and where workers have compiled for different shapes.
_sum.register_effect(EffectType.ORDERED)


class Pending:
    """A sum under way. Copies and pickles as its result."""

    def __init__(
        self, message: Tensor, wire: Tensor | None = None, flight: Flight | None = None
    ) -> None:
        self._message = message
        self._wire = wire
        self._flight = flight
        self.mixed: Flight | None = None
        """The exchange, if some workers sent something else: to be told to `raise_mixed`, once
        waited for.
        """

    def wait(self) -> Tensor:
        """The sum over the group; on CUDA ordered before what the current stream does next.

        Raises:
            ExchangeError: it broke.
        """
        if self._flight is not None and self._wire is not None:
            start = time.perf_counter()
            (flight, self._flight), (wire, self._wire) = (self._flight, None), (self._wire, None)
            with flight:
                _wait(flight.work)
            flight.land(wire)
            self._message, is_one = _open(wire, self._message, flight.kind, flight.name)
            self.mixed = None if is_one else flight
            for tally in _tallies:
                tally.add(flight.kind, 0, 0, time.perf_counter() - start)
        return self._message

    def __getstate__(self) -> dict[str, object]:
        return {"_message": self.wait(), "_wire": None, "_flight": None, "mixed": None}


def start_sum(
    message: Tensor, group: dist.ProcessGroup | None, kind: str, name: str = ""
) -> Pending:
    """Begin to sum `message` (float64) over `group`.

    *Collectives*: one asynchronous all-reduce of `size_of(message.numel(), room)` float64 numbers;
    every member must call.
    """
    if group is None:
        return Pending(message)
    start = time.perf_counter()
    flight, wire = _begin_sum(message, group, kind, name)
    with flight:
        flight.work = dist.all_reduce(wire, group=group, async_op=True)
    _note(kind, wire, start)
    return Pending(message, wire, flight)


def gather(message: Tensor, group: dist.ProcessGroup | None, kind: str, name: str = "") -> Tensor:
    """The messages of all workers, stacked by rank: shape (world size, *message.shape)."""
    if group is None:
        return message.unsqueeze(0)
    start = time.perf_counter()
    flight = _begin("gather", message, group, kind, name, message.numel())
    parts = [torch.empty_like(message) for _ in range(dist.get_world_size(group))]
    with flight:
        _wait(dist.all_gather(parts, message, group=group, async_op=debug.is_debug()))
    flight.land(message)
    _note(kind, message, start)
    return torch.stack(parts)


def gather_text(text: str, group: dist.ProcessGroup, kind: str, device: torch.device) -> list[str]:
    """The texts of all workers, by their rank in `group`.

    *Collectives*: two all-gathers, of 1 and of the longest text's bytes / 8 numbers; every member
    must call.
    """
    # Bytes travel as they are, eight in the place of a number. A last 1 marks the end; what follows
    # is padding.
    data = torch.tensor([*text.encode(), 1], dtype=torch.uint8)
    length = torch.full((1,), -(-data.numel() // 8), dtype=torch.float64, device=device)
    longest = int(gather(length, group, kind).max())
    message = torch.zeros(8 * longest, dtype=torch.uint8)
    message[: data.numel()] = data
    rows = gather(message.view(torch.float64).to(device), group, kind).cpu().view(torch.uint8)
    return [bytes(row.tolist()).rstrip(b"\0")[:-1].decode() for row in rows]


def _begin(
    op: str, message: Tensor, group: dist.ProcessGroup, kind: str, name: str, count: int
) -> Flight:
    for announce in announcers:
        announce(op, message, group)
    flight = Flight(message.numel(), group, kind, name, count)
    if debug.is_debug():
        flight.signing = Signing(flight, group)
        with flight:
            flight.signing.reach()
    return flight


def _wait(work: dist.Work | None) -> None:
    """For what has been enqueued (in debug mode, and what was begun); what blocks has been waited
    for.
    """
    seconds = debug.debug_timeout_seconds()
    if work is None:
        return
    if debug.is_debug() and seconds is not None:
        work.wait(timedelta(seconds=seconds))
    else:
        work.wait()


def _note(kind: str, message: Tensor, start: float) -> None:
    done = Exchange(kind, message.numel(), time.perf_counter() - start)
    for exchanges in _records:
        exchanges.append(done)
    for tally in _tallies:
        tally.add(kind, 1, done.numel, done.seconds)
