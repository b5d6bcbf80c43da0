"""In-flight exchanges: a ring buffer of recent ones, error messages, and a watchdog thread.

If an exchange is stuck until shortly before its process group gives up (on nccl that ends the
process, and no exception says why), the thread writes the recent exchanges to standard error, and
has the other ranks write theirs: together they show who is where.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm import undocumented
from syncnorm.comm import shared
from syncnorm.comm.world import is_current, rank
from syncnorm.errors import ExchangeError

_KEPT = 64
# This share of a group's timeout before its end, and no more than so many seconds.
_MARGIN_SHARE, _MARGIN_SECONDS = 0.25, 30.0
_DEFAULT_TIMEOUT_SECONDS = 600.0
_STUCK_KEY = "syncnorm/stuck"


class GroupLog:
    """This process's counts of the exchanges over one group.

    Does not hold the group: torch must be able to end it.
    """

    members: list[int]
    timeout_seconds: float

    def __init__(self, group: dist.ProcessGroup) -> None:
        timeout = undocumented.timeout_of(group)
        self.members = dist.get_process_group_ranks(group)
        self._group = weakref.ref(group)
        self.timeout_seconds = (
            _DEFAULT_TIMEOUT_SECONDS if timeout is None else timeout.total_seconds()
        )
        self.calls: Counter[tuple[str, str]] = Counter()
        """The exchanges so far, by kind and name."""
        self.agreed = 0
        """The number of exchanges that were agreed upon (debug mode)."""
        self.room = 0
        """The least size of a sum over the group (see `syncnorm.comm.exchange.make_room`)."""
        self.pid: int = os.getpid()
        """The process that has used the group first; a fork of it lacks gloo's threads."""
        self.is_on_one_level = False
        """True while all members send by torch.distributed, whatever `hosts` has made."""

    @property
    def is_of_the_past(self) -> bool:
        """True once the group has been destroyed."""
        group = self._group()
        return group is None or not is_current(group)

    @property
    def margin_seconds(self) -> float:
        return min(_MARGIN_SECONDS, self.timeout_seconds * _MARGIN_SHARE)


_logs: weakref.WeakKeyDictionary[dist.ProcessGroup, GroupLog] = weakref.WeakKeyDictionary()


def log_of(group: dist.ProcessGroup) -> GroupLog:
    """Return the log of `group`, made at the first call."""
    log = _logs.get(group)
    if log is None:
        log = _logs[group] = GroupLog(group)
    return log


def reset_rooms() -> None:
    """Have sums travel in their own sizes again, once the models that asked for room are gone."""
    for log in _logs.values():
        log.room = 0


def reset_calls(group: dist.ProcessGroup) -> None:
    """Count the calls over `group` from 0 again, so that ranks that were apart agree."""
    if group in _logs:
        _logs[group].calls.clear()


class InFlight:
    """One exchange of this process. As a context, it turns errors into `ExchangeError`.

    Args:
        envelope: numbers sent, identity and padding included; and the identity, 0 if it has none.
        log: of the group.
        kind: the payload, see `Exchange`.
        name: the layer, or whatever else is exchanged for.
        count: numbers of the payload.
    """

    call: int
    began: float

    def __init__(
        self, envelope: tuple[int, int], log: GroupLog, kind: str, name: str, count: int
    ) -> None:
        self.call = log.calls[kind, name] = log.calls[kind, name] + 1
        self.log = log
        self.timeout_seconds: float = log.timeout_seconds
        """The time to wait for other ranks through shared memory; debug mode may set another."""
        self.kind = kind
        self.name = name
        self.envelope = envelope
        self.size: int = envelope[0]
        self.count = count
        self.began = time.monotonic()
        self.is_reported = False
        self.work: dist.Work | shared.Message | None = None
        """Set while the caller has yet to wait for it."""
        self.diagnose: Callable[[BaseException], str] | None = None
        """In debug mode: gives all ranks the same message after an error."""
        self.is_finished: bool = False
        """True once this process has gone on."""
        self._done: torch.Event | None = None
        _recent.append(self)
        if _watchdog.thread is None:
            _watchdog.start()

    def finish(self, message: Tensor) -> None:
        """Mark it as over; on CUDA, once the message's device has come to this point."""
        if message.is_cuda:
            # The event of a captured graph tells nothing: each replay sends anew.
            _watchdog.is_capturing = torch.cuda.is_current_stream_capturing()
            if not _watchdog.is_capturing:
                self._done = torch.Event(message.device)
                # By itself it is recorded on the current device, which may be another one.
                is_here = torch.cuda.current_device() == message.get_device()
                self._done.record(None if is_here else torch.cuda.current_stream(message.device))
        self.is_finished, self.work, self.diagnose = True, None, None

    @property
    def is_over(self) -> bool:
        done = self._done  # read once: the watchdog's thread may clear it meanwhile
        if done is not None:
            if not done.query():
                return False
            self._done = None
        return self.is_finished or (self.work is not None and self.work.is_completed())

    def is_old(self) -> bool:
        """True if its group will give up soon, should it still be under way."""
        return time.monotonic() - self.began > self.log.timeout_seconds - self.log.margin_seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if error is not None:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Mark it as over. Of an error of torch.distributed's raise one that names layer and call.

        In debug mode that names the ranks that are gone.
        """
        self.is_finished, self.work = True, None
        diagnose, self.diagnose = self.diagnose, None
        if not isinstance(error, RuntimeError) or isinstance(error, ExchangeError):
            return
        if diagnose is not None:
            raise ExchangeError(diagnose(error)) from error
        alone = ", evaluates without model.eval()," if self.kind == "moments" else ""
        raise ExchangeError(
            f"exchange must be made by all of ranks {self.log.members}, got an error on rank "
            f"{rank()} at {self} after {time.monotonic() - self.began:.1f} s: {error}. A worker "
            f"has ended, raised, skipped this exchange{alone} or is late; SYNCNORM_DEBUG=1 on all "
            "workers says which."
        ) from error

    def __str__(self) -> str:
        return describe(self.kind, self.name, self.call, self.count)


def describe(kind: str, name: str, call: int, count: int) -> str:
    """Describe the exchange that a rank is in, for errors."""
    phase = {"moments": "training forward, ", "gradients": "backward, "}.get(kind, "")
    where = f"call {call} of {name!r}" if name else f"call {call}"
    return f"{where} ({phase}{kind}, {count} float64)"


_recent: deque[InFlight] = deque(maxlen=_KEPT)


def last_exchanges() -> str:
    """Return the last exchanges of this process, oldest first, a line each."""
    now = time.monotonic()
    lines = (
        f"  {now - f.began:8.1f} s ago: {f}{', under way' if _is_under_way(f) else ''}, ranks "
        f"{f.log.members}"
        for f in list(_recent)
    )
    return "\n".join(lines)


def _is_under_way(flight: InFlight) -> bool:
    if _watchdog.is_capturing and flight.is_finished:
        return False  # but for the device, which is not asked now
    # A device that has failed cannot be asked.
    with contextlib.suppress(RuntimeError):
        return not flight.is_over
    return False


class Watchdog:
    """The thread that reports exchanges that are stuck."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self._ends = threading.Event()
        self._reported: weakref.ref[dist.ProcessGroup] | None = None
        """The default group whose ranks have reported, or cannot be reached."""
        self.is_capturing = False
        """True if a CUDA graph is being captured, or only replayed since: another thread's look at an
        event would end the capture."""

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
        is_spared = False
        while not self._ends.wait(
            min((f.log.margin_seconds for f in list(_recent)), default=1) / 3
        ):
            if not is_spared and torch.cuda.is_initialized():
                _spare_captures()
                is_spared = True
            self._check()

    def _check(self) -> None:
        stuck = next(
            (
                f
                for f in list(_recent)
                # What a group that is gone has left unfinished is nobody's to wait for.
                if f.is_old()
                and not f.is_reported
                and not f.log.is_of_the_past
                and _is_under_way(f)
            ),
            None,
        )
        world = dist.group.WORLD
        if stuck is not None:
            stuck.is_reported = True
            _report(
                f"{stuck} has been under way for {time.monotonic() - stuck.began:.1f} s, and its "
                f"process group gives up after {stuck.log.timeout_seconds:g} s."
            )
        elif self._reported is not None and self._reported() is world:
            return
        if world is None:
            return
        try:
            if stuck is not None:
                undocumented.world_store().set(_STUCK_KEY, str(rank()))
            elif not undocumented.world_store().check([_STUCK_KEY]):
                return
            else:
                _report("an exchange of another worker is stuck.")
        except (RuntimeError, ValueError):
            pass  # The store has ended with its host.
        self._reported = weakref.ref(world)


def _spare_captures() -> None:
    """Have this thread's looks at events end no capture of a CUDA graph in another thread.

    By CUDA's default they do, and a program's capture is known here (`is_capturing`) only once an
    exchange has been made in it.
    """
    with contextlib.suppress(OSError, AttributeError):
        thread_local = ctypes.c_int(1)
        driver = ctypes.CDLL("libcuda.so.1")
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(thread_local))


_watchdog = Watchdog()


def _report(what: str) -> None:
    header = f"syncnorm, rank {rank()}: {what} The last exchanges of this rank:"
    sys.stderr.write(f"{header}\n{last_exchanges()}\n")
    sys.stderr.flush()
