"""Exchanges under way: who sent what, what became of it, and words for when it went wrong.

The last exchanges of this process are kept. If one of them is stuck until shortly before its
process group gives up (on nccl that ends the process, and no exception says why), a thread writes
them to standard error, and has the other workers write theirs: together they show who is where.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
import time
import weakref
from collections import Counter, deque
from typing import TYPE_CHECKING, Self

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm.comm import groups
from syncnorm.errors import ExchangeError

if TYPE_CHECKING:
    from syncnorm.comm.consensus import Signing

_KEPT = 64
# This share of a group's timeout before its end, and no more than so many seconds.
_MARGIN_SHARE, _MARGIN_SECONDS = 0.25, 30.0
_DEFAULT_TIMEOUT_SECONDS = 600.0
_STUCK_KEY = "syncnorm/stuck"


class Line:
    """What this process knows of the exchanges over one group.

    Holds no group: torch must be able to end them.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        timeout = groups._timeout(group)
        self.members = dist.get_process_group_ranks(group)
        self.timeout_seconds = (
            _DEFAULT_TIMEOUT_SECONDS if timeout is None else timeout.total_seconds()
        )
        self.calls: Counter[tuple[str, str]] = Counter()
        self.signed = 0
        """How many exchanges were agreed upon (debug mode)."""
        self.room = 0
        """The least size of a sum over the group (see `syncnorm.comm.exchange.make_room`)."""

    @property
    def margin_seconds(self) -> float:
        return min(_MARGIN_SECONDS, self.timeout_seconds * _MARGIN_SHARE)


_lines: weakref.WeakKeyDictionary[dist.ProcessGroup, Line] = weakref.WeakKeyDictionary()


def line_of(group: dist.ProcessGroup) -> Line:
    """What is known of the exchanges over `group`."""
    line = _lines.get(group)
    if line is None:
        line = _lines[group] = Line(group)
    return line


def forget_rooms() -> None:
    """Have sums over all groups travel in their own sizes again: the models that asked for room are
    gone.
    """
    for line in _lines.values():
        line.room = 0


def count_anew(group: dist.ProcessGroup) -> None:
    """Begin to count calls anew, on all workers: one that was away does not know what the others
    have called.
    """
    if group in _lines:
        _lines[group].calls.clear()


class Flight:
    """One exchange of this process.

    Args:
        size: how many numbers are sent.
        group: over which group.
        kind: what they carry.
        name: the layer, or whatever else is exchanged for.
        count: how many of them that takes.
    """

    def __init__(
        self, size: int, group: dist.ProcessGroup, kind: str, name: str, count: int
    ) -> None:
        line = line_of(group)
        line.calls[kind, name] += 1
        self.line = line
        self.kind = kind
        self.name = name
        self.call = line.calls[kind, name]
        self.size = size
        self.count = count
        self.began = time.monotonic()
        self.is_told = False
        self.work: dist.Work | None = None
        """What somebody has yet to wait for."""
        self.signing: Signing | None = None
        """In debug mode, the words with the other workers."""
        self._is_over = False
        self._done: torch.cuda.Event | None = None
        _flights.append(self)
        if _watch.thread is None:
            _watch.start()

    def land(self, message: Tensor) -> None:
        """It is over; on CUDA when the device has come to this point of the stream."""
        if message.is_cuda:
            self._done = torch.cuda.Event()
            self._done.record()
        self._is_over, self.work, self.signing = True, None, None

    @property
    def is_over(self) -> bool:
        if self._done is not None:
            return self._done.query()
        return self._is_over or (self.work is not None and self.work.is_completed())

    def is_old(self) -> bool:
        """Whether its group will give up soon, if it is still under way."""
        return time.monotonic() - self.began > self.line.timeout_seconds - self.line.margin_seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        """Name the error of torch.distributed: the layer and the call, in debug mode who is gone."""
        if error is None:
            return
        self._is_over, self.work = True, None
        signing, self.signing = self.signing, None
        if not isinstance(error, RuntimeError) or isinstance(error, ExchangeError):
            return
        if signing is not None:
            raise ExchangeError(signing.broken(error)) from error
        raise ExchangeError(
            f"exchange must be made by all of ranks {self.line.members}, got an error on rank "
            f"{groups.rank()} at "
            f"{self} after {time.monotonic() - self.began:.1f} s: {error}. A worker has ended, "
            "raised, skipped this "
            "exchange or is late; SYNCNORM_DEBUG=1 on all workers says which."
        ) from error

    def __str__(self) -> str:
        return describe(self.kind, self.name, self.call, self.count)


def describe(kind: str, name: str, call: int, count: int) -> str:
    """Where a worker is, in words."""
    phase = {"moments": "training forward, ", "gradients": "backward, "}.get(kind, "")
    where = f"call {call} of {name!r}" if name else f"call {call}"
    return f"{where} ({phase}{kind}, {count} float64)"


_flights: deque[Flight] = deque(maxlen=_KEPT)


def last_exchanges() -> str:
    """The last exchanges of this process, oldest first, a line each."""
    now = time.monotonic()
    lines = (
        f"  {now - f.began:8.1f} s ago: {f}{', under way' if _is_under_way(f) else ''}, ranks "
        f"{f.line.members}"
        for f in list(_flights)
    )
    return "\n".join(lines)


def _is_under_way(flight: Flight) -> bool:
    # The event of a captured graph cannot be asked.
    with contextlib.suppress(RuntimeError):
        return not flight.is_over
    return False


class _Watch:
    """The thread that looks after exchanges that are stuck."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self._ends = threading.Event()
        self._told: weakref.ref[dist.ProcessGroup] | None = None
        """The default group whose workers know already, or cannot be told."""

    def start(self) -> None:
        self.thread = threading.Thread(target=self._run, name="syncnorm-watch", daemon=True)
        self.thread.start()
        # A thread that is inside torch when the interpreter ends would abort the process.
        atexit.register(self._end)

    def _end(self) -> None:
        self._ends.set()
        if self.thread is not None:
            self.thread.join(timeout=1.0)

    def _run(self) -> None:
        while not self._ends.wait(
            min((f.line.margin_seconds for f in list(_flights)), default=1.0) / 3
        ):
            self._look()

    def _look(self) -> None:
        stuck = next(
            (f for f in list(_flights) if f.is_old() and not f.is_told and _is_under_way(f)), None
        )
        world = dist.group.WORLD
        if stuck is not None:
            stuck.is_told = True
            _tell(
                f"{stuck} has been under way for {time.monotonic() - stuck.began:.1f} s, and its "
                "process group "
                f"gives up after {stuck.line.timeout_seconds:g} s."
            )
        elif self._told is not None and self._told() is world:
            return
        if world is None:
            return
        try:
            if stuck is not None:
                world_store().set(_STUCK_KEY, str(groups.rank()))
            elif not world_store().check([_STUCK_KEY]):
                return
            else:
                _tell("an exchange of another worker is stuck.")
        except (RuntimeError, ValueError):
            pass  # The store has ended with its host.
        self._told = weakref.ref(world)


_watch = _Watch()


def _tell(what: str) -> None:
    header = f"syncnorm, rank {groups.rank()}: {what} The last exchanges of this rank:"
    sys.stderr.write(f"{header}\n{last_exchanges()}\n")
    sys.stderr.flush()


def world_store() -> dist.distributed_c10d.Store:
    """Where all workers can leave words for each other."""
    # Not documented; a test notices if it changes.
    return dist.distributed_c10d._get_default_store()
