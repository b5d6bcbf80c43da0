"""The one kind of message: float64 numbers, summed (or gathered) over the ranks of a group.

Every exchange of the library is made here, and counted and timed by `tally`.

A sum travels with its identity: the last number is a hash of the layer's name and of the payload's
kind. The sum of equal identities is a multiple of each; that of unequal ones is not (but for a
chance of about 1e-10), which every rank sees alike. So ranks that are in different layers, or in a
forward and a backward pass, raise one error instead of pooling what does not belong together.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm.comm import debug, hosts, shared, tally
from syncnorm.comm.consensus import NO_DATA, Consensus, at_different_places
from syncnorm.comm.handles import NamedGroup
from syncnorm.comm.inflight import InFlight, log_of, reset_calls
from syncnorm.comm.tally import Exchange, Tally, Total, record
from syncnorm.comm.world import device_for, ranks
from syncnorm.device import is_host
from syncnorm.errors import ExchangeError, InputError
from syncnorm.maths import kernels
from syncnorm.undocumented import in_memory

__all__ = [
    "NO_DATA",
    "Exchange",
    "Failure",
    "Pending",
    "Tally",
    "Total",
    "announcers",
    "gather",
    "gather_text",
    "make_room",
    "raise_failure",
    "record",
    "size_of",
    "start_sum",
    "sum_",
]


Announce = Callable[[str, int, dist.ProcessGroup], None]
announcers: list[Announce] = []
"""Called before each exchange with its way, the numbers sent and the group, for `join`. The ways
are "sum" and "gather", collectives of torch.distributed, and "native sum", which is none."""


def size_of(count: int, room: int = 0) -> int:
    """The size of a message: `count` numbers of payload, the identity, and padding.

    The sums of a layer's forward (2C+1) and backward pass (2C) have the same size: backends that
    are given messages of different sizes abort or hang, with no hint at the cause.

    Args:
        count: numbers of the payload.
        room: the least size over its group, see `make_room`.
    """
    return max(room, 2 * (count // 2 + 1))


def make_room(group: dist.ProcessGroup | None, count: int) -> None:
    """Pad all sums over `group` to the size of one of `count` numbers, at least.

    Then ranks that are in layers of different widths raise an error, too. Every member must call,
    with the same count.
    """
    if group is not None:
        log = log_of(group)
        log.room = max(log.room, size_of(count))


def sum_(
    message: Tensor, group: dist.ProcessGroup | NamedGroup | None, kind: str, name: str = ""
) -> Tensor:
    """Sum `message` over `group`: the same bits on every rank.

    *Collectives*: one all-reduce of `size_of(message.numel(), room)` float64 numbers; every member
    of `group` must call. In code that is being compiled the message is sent when the code runs.

    Args:
        message: float64, not changed.
        group: the ranks; None returns the message itself.
        kind: the payload, see `Exchange`.
        name: the layer, for errors and for the identity.

    Raises:
        ExchangeError: it broke; or, on all ranks alike, some of them sent another payload. (On
            CUDA the latter is an error in debug mode only. Otherwise the sum is NaN.) In debug
            mode also: a rank has not come in time.
    """
    if group is None:
        return message
    if isinstance(group, NamedGroup):
        return torch.ops.syncnorm.sum(message, group.name, kind, name)  # of comm.compiled
    start = time.perf_counter()
    if type(message) is not Tensor:
        message = in_memory(message)
    segment = shared.segment_of(group) if message.is_cpu else None
    if segment is None:
        flight, total, is_same = _sum_by_torch(message, group, kind, name)
    else:
        flight = _begin("native sum", message, group, kind, name)
        # Neither `with flight` nor `flight.finish`: they would be a tenth of a small layer's calls.
        try:
            total, is_same = segment.sum(message, *flight.envelope, flight.timeout_seconds)
        except BaseException as error:
            flight.fail(error)
            raise
        flight.is_finished, flight.diagnose = True, None
    if tally.watchers:
        tally.tell(kind, 1, flight.size, start)
    if not is_same:
        raise_failure(flight, group)
    return total


def _sum_by_torch(
    message: Tensor, group: dist.ProcessGroup, kind: str, name: str
) -> tuple[InFlight, Tensor, bool]:
    """The sum by torch.distributed alone, or by hosts; and False if ranks sent different ones."""
    levels = _levels_for(message, group)
    flight = _begin("native sum" if levels else "sum", message, group, kind, name)
    wire = _wire(message, flight)
    with flight:
        if levels is None:
            _wait(dist.all_reduce(wire, group=group, async_op=debug.is_on))
        else:
            wire = levels.sum_(wire, flight.timeout_seconds, _wait)
    flight.finish(wire)
    return flight, *_unpack(wire, message, flight)


@functools.lru_cache(maxsize=4096)
def _envelope(way: str, kind: str, name: str, count: int, room: int) -> tuple[int, int]:
    """The size of a message and its identity; 0 where it has none.

    A hash to 38 bits: the sum of equal ones is exact in float64 for up to 32768 ranks.
    """
    if way == "gather" or kind == NO_DATA:
        return count, 0
    digest = hashlib.blake2b(f"{count} {kind} of {name}".encode(), digest_size=8).digest()
    return size_of(count, room), int.from_bytes(digest, "big") >> 27 | 1 << 37


def _levels_for(message: Tensor, group: dist.ProcessGroup) -> hosts.TwoLevels | None:
    """The two levels of a group on several hosts; None where messages go by torch.distributed."""
    levels = hosts.levels_of(group) if message.is_cpu else None
    return None if levels is None or log_of(group).is_on_one_level else levels


def _wire(message: Tensor, flight: InFlight) -> Tensor:
    """[payload (count), identity and padding (size - count)], as torch.distributed sends them.

    A rank without data sends zeros in place of all of it, whatever the others send.
    """
    size, identity = flight.envelope
    if not identity:
        return message
    return kernels.message_kernels(message).add_identity(message, size, identity)


def _unpack(wire: Tensor, message: Tensor, flight: InFlight) -> tuple[Tensor, bool]:
    """Return the sum, and False if a rank is seen to have sent another kind or name.

    Outside of debug mode nobody looks on CUDA, which would have to wait: the sum is NaN then.
    """
    _, identity = flight.envelope
    if not identity:
        return wire, True
    count = message.numel()
    # One view where a slice and a reshape would be two.
    total = wire.as_strided(message.shape, message.contiguous().stride())
    if is_host(wire) or debug.is_on:
        return total, math.fmod(wire[-1].item(), identity) == 0
    kernels.message_kernels(wire).compare_identity_(wire, count, identity)
    return total, True


Failure = InFlight | ExchangeError
"""An exchange that failed: itself, if some ranks sent another payload; or how it broke."""


def raise_failure(failure: Failure, group: dist.ProcessGroup) -> NoReturn:
    """Raise how an exchange broke, or exchange the ranks' positions and raise the same everywhere.

    *Collectives*: for the latter two all-gathers. Every rank whose sum over `group` was of
    different messages must call.
    """
    if isinstance(failure, ExchangeError):
        raise failure
    texts = gather_text(str(failure), group, "agreement", device_for(group))
    reset_calls(group)
    raise ExchangeError(at_different_places(dict(zip(ranks(group), texts, strict=True))))


class Pending:
    """A sum in flight. Copies and pickles as its result."""

    def __init__(
        self,
        message: Tensor,
        wire: Tensor | None = None,
        flight: InFlight | None = None,
        sent: shared.Message | None = None,
    ) -> None:
        self._message = message
        self._wire = wire
        self._flight = flight
        self._sent = sent
        self.failure: Failure | None = None
        """After `wait` or `settle`, for `raise_failure`: what went wrong, if anything did."""

    def settle(self) -> Tensor | None:
        """Return the sum as `wait` does, or None if it failed. Raises nothing."""
        try:
            total = self.wait()
        except ExchangeError as error:
            self.failure = error
            return None
        return total if self.failure is None else None

    def wait(self) -> Tensor:
        """Return the sum; on CUDA the current stream waits for it, not the host.

        Raises:
            ExchangeError: it broke.
        """
        if self._flight is not None:
            start = time.perf_counter()
            flight, self._flight = self._flight, None
            (wire, self._wire), (sent, self._sent) = (self._wire, None), (self._sent, None)
            with flight:
                if os.getpid() != flight.log.pid:
                    _check_arrived(flight, is_shared=sent is not None)
                is_same = sent is None or sent.wait(flight.timeout_seconds)
                if wire is not None and isinstance(flight.work, dist.Work):
                    _wait(flight.work)
            flight.finish(self._message)
            if sent is not None:
                self._message = sent.total
            elif wire is not None:
                self._message, is_same = _unpack(wire, self._message, flight)
            self.failure = None if is_same else flight
            if tally.watchers:
                tally.tell(flight.kind, 0, 0, start)
        return self._message

    def __getstate__(self) -> dict[str, object]:
        self.settle()
        return {**vars(self), "failure": None}


def start_sum(
    message: Tensor, group: dist.ProcessGroup | None, kind: str, name: str = ""
) -> Pending:
    """Start to sum `message` (float64) over `group`.

    It goes by one level, also where the members of `group` are on several hosts: gloo's threads
    carry it on while this one computes.

    *Collectives*: one asynchronous all-reduce of `size_of(message.numel(), room)` float64 numbers;
    every member must call.
    """
    if group is None:
        return Pending(message)
    start = time.perf_counter()
    if type(message) is not Tensor:
        message = in_memory(message)
    segment = shared.segment_of(group) if message.is_cpu else None
    flight = _begin("native sum" if segment else "sum", message, group, kind, name)
    wire, sent = None, None
    if segment is not None:
        with flight:
            sent = segment.send(message, *flight.envelope, flight.timeout_seconds)
        flight.work = sent
    else:
        wire = _wire(message, flight)
        with flight:
            flight.work = dist.all_reduce(wire, group=group, async_op=True)
    if tally.watchers:
        tally.tell(kind, 1, flight.size, start)
    return Pending(message, wire, flight, sent)


def gather(message: Tensor, group: dist.ProcessGroup | None, kind: str, name: str = "") -> Tensor:
    """Gather the messages of all ranks: shape (group size, *message.shape).

    *Collectives*: one all-gather; every member must call, with a message of this shape.
    """
    if group is None:
        return message.unsqueeze(0)
    start = time.perf_counter()
    flight = _begin("gather", message, group, kind, name)
    parts = [torch.empty_like(message) for _ in range(dist.get_world_size(group))]
    with flight:
        _wait(dist.all_gather(parts, message, group=group, async_op=debug.is_on))
    flight.finish(message)
    if tally.watchers:
        tally.tell(kind, 1, flight.size, start)
    return torch.stack(parts)


def gather_text(text: str, group: dist.ProcessGroup, kind: str, device: torch.device) -> list[str]:
    """Gather the texts of all ranks, in the order of `group`.

    *Collectives*: two all-gathers, of 1 and of the longest text's bytes / 8 numbers; every member
    must call.
    """
    # Eight bytes take the place of a number. A last 1 marks the end; zeros pad the rest.
    data = torch.tensor([*text.encode(), 1], dtype=torch.uint8, device="cpu")
    length = torch.full((1,), -(-data.numel() // 8), dtype=torch.float64, device=device)
    longest = int(gather(length, group, kind).max())
    message = torch.zeros(8 * longest, dtype=torch.uint8, device="cpu")
    message[: data.numel()] = data
    # (group size, numbers) of float64, then (group size, 8 * numbers) of bytes.
    rows = gather(message.view(torch.float64).to(device), group, kind).cpu().view(torch.uint8)
    return [bytes(row.tolist()).rstrip(b"\0")[:-1].decode() for row in rows]


def _begin(way: str, message: Tensor, group: dist.ProcessGroup, kind: str, name: str) -> InFlight:
    if message.dtype != torch.float64:
        raise InputError(
            f"`x` must be on a device that has float64 where workers pool, got {message.dtype} on "
            f"{message.device} in {name or kind}. Move the model to the CPU."
        )
    log, count = log_of(group), message.numel()
    envelope = _envelope(way, kind, name, count, log.room)
    for announce in announcers:
        announce(way, envelope[0], group)
    flight = InFlight(envelope, log, kind, name, count)
    if os.getpid() != log.pid:
        raise _forked(flight)
    if debug.is_on:
        flight.timeout_seconds = debug.wait_seconds or flight.timeout_seconds
        consensus = Consensus(flight, group)
        flight.diagnose = consensus.diagnose
        with flight:
            consensus.agree()
    return flight


def _check_arrived(flight: InFlight, *, is_shared: bool) -> None:
    """Raise in a fork unless the sum was there before: gloo's threads, and the memory, are not."""
    work = flight.work
    if is_shared or (isinstance(work, dist.Work) and not work.is_completed()):
        raise _forked(flight)


def _forked(flight: InFlight) -> ExchangeError:
    return ExchangeError(
        f"exchange must be made by the process that belongs to the group, got {flight} in a fork "
        f"of it: {shared.FORKED}. Start processes of your own by spawn, or evaluate in this one."
    )


def _wait(work: dist.Work | None) -> None:
    """Wait for an asynchronous collective; None is one that was waited for when it was made."""
    seconds = debug.wait_seconds
    if work is None:
        return
    if debug.is_on and seconds is not None:
        work.wait(timedelta(seconds=seconds))
    else:
        work.wait()
