"""Sums through memory that the workers of one host share, by the native library.

The members of a statistics group that are on one host have a segment of their own, made when the
group is (see `hosts`). It has no name in the file system: the first of them makes it (a memfd), the
others open it through that process's folder in /proc, and it goes with the last process that has it
mapped.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm import native, system

_DONE, _NOT_YET, _MIXED, _BROKEN, _LEFT = range(5)
# Of an exchange that nobody has to be waited for any more.
_AT_ONCE = (-1 - _DONE, -1 - _MIXED)
_SPIN_SECONDS = 50e-6
# Between two looks at signals, at the clock and at whether the others live.
_NAP_SECONDS = 0.05
FORKED = "a forked process has no part in its parent's groups"


class Facts(NamedTuple):
    """One member's part in the negotiation of `hosts`."""

    refusal: str
    """The reason why this member has no shared memory; empty if it has."""
    machine: str
    digest: str
    pid: int
    started: str
    """The start of this process, by which a later one of its number is told from it."""
    cores: tuple[int, ...]
    fd: int
    """The open segment that it has made; that of a host's first member is used."""
    token: str


@cache
def _functions() -> Any:
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    return native.functions(
        "syncnorm_messages_",
        {
            "bytes": (number, integer),
            "capacity": (number,),
            "ahead": (integer,),
            "open": (pointer, integer, integer, integer, ctypes.c_char_p, number, number),
            "close": (None, pointer),
            "give_up": (None, pointer),
            "send": (number, pointer, pointer, number, number, number),
            "missing": (integer, pointer, number, ctypes.c_char_p),
            "is_there": (integer, pointer, number),
            "sum": (integer, pointer, number, pointer, number),
            "exchange": (number, pointer, pointer, pointer, number, number, number),
        },
    )


def refusal() -> str:
    """The reason why this process sends nothing over shared memory; empty if it can."""
    why, fd, _ = offer(2)
    if not why:
        os.close(fd)
    return why


def offer(members: int) -> tuple[str, int, str]:
    """Make a segment that others can open: its file and its token, after the reason if there is none."""
    if os.environ.get("SYNCNORM_SHARED_MEMORY", "1") == "0":
        return "turned off by SYNCNORM_SHARED_MEMORY=0", -1, ""
    if not system.is_linux():
        return f"not on {sys.platform}", -1, ""
    library = _functions()
    if library is None:
        return f"the native library is not used: {native.load().detail}", -1, ""
    token, fd = f"syncnorm-{secrets.token_hex(12)}", -1
    try:
        fd = os.memfd_create(token, os.MFD_CLOEXEC)
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, library.bytes(members))
        os.pwrite(fd, token.encode(), 0)
        os.close(_open(os.getpid(), fd, token))
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        return f"no segment can be made: {error}", -1, ""
    return "", fd, token


def _open(pid: int, fd: int, token: str) -> int:
    """Open the segment of another process, or raise OSError."""
    path = Path(f"/proc/{pid}/fd/{fd}")
    if str(path.readlink()) != f"/memfd:{token} (deleted)":
        raise OSError(f"{path} is another file")
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def numbering() -> str:
    """An identifier of this process's numbering of processes, of which a host may have many."""
    return str(Path("/proc/self/ns/pid").readlink())


def start_of(pid: int) -> str:
    """The start of a live process; empty if it has ended, also where nobody has heard yet."""
    try:
        # Bytes: a name is cut off at 15 of them, within a letter if need be.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


class Message:
    """A message of this member that is on its way."""

    segment: Segment
    number: int
    total: Tensor
    count: int
    is_done: bool
    is_same: bool

    __slots__ = ("count", "is_done", "is_same", "number", "segment", "total")

    def __init__(self, segment: Segment, number: int, total: Tensor) -> None:
        self.segment = segment
        self.number = number
        self.total = total
        self.count = total.numel()
        self.is_done = False
        self.is_same = True

    def is_completed(self) -> bool:
        """True once nobody has to wait for it."""
        return self.is_done or self.segment.is_there(self.number)

    def wait(self, seconds: float) -> bool:
        """Wait for the sum, `total`; False if some members sent another payload.

        Raises:
            RuntimeError: a member has ended, given up, or not come within `seconds`.
        """
        if not self.is_done:
            self.segment.finish(self, seconds)
        return self.is_same


class Segment:
    """One member's view of the memory that a group shares."""

    def __init__(self, handle: int, peers: list[Facts], members: list[int]) -> None:
        library = _functions()
        assert library is not None
        self._library = library
        self._handle: int | None = handle
        self._peers = peers
        self._members = members
        self._lock = threading.Lock()
        # In the order in which they were sent, which is that in which they are summed.
        self._unsummed: deque[Message] = deque()
        self._ahead: int = library.ahead()
        self.capacity: int = library.capacity()
        self._close = weakref.finalize(self, library.close, handle)
        # Threads may still look at it then; the process ends anyway.
        self._close.atexit = False
        _live.add(self)

    def forget(self) -> None:
        """Leave it to the parent, in a forked child: there the memory is not mapped."""
        self._close.detach()
        self._handle = None
        self._lock = threading.Lock()

    def send(
        self, message: Tensor, size: int, identity: int, seconds: float, *, is_zero: bool = False
    ) -> Message:
        """Publish a message, of which `size` and `identity` are to be the same on all members.

        Args:
            is_zero: nothing is to be added to the sum; `message` gives its shape.

        Raises:
            RuntimeError: see `Message.wait`; earlier messages may have to be waited for.
        """
        message = message.contiguous()
        if size > self.capacity:
            return self._send_pieces(message, size, identity, seconds, is_zero=is_zero)
        with self._lock:
            return self._send_piece(message, size, identity, seconds, is_zero=is_zero)

    def sum(self, message: Tensor, size: int, identity: int, seconds: float) -> tuple[Tensor, bool]:
        """Publish a message and wait: the sum, and False if some members sent another payload.

        Raises:
            RuntimeError: see `Message.wait`.
        """
        message = message.contiguous()
        if size > self.capacity:
            sent = self._send_pieces(message, size, identity, seconds)
            return sent.total, sent.is_same
        with self._lock:
            if self._unsummed:
                sent = self._send_piece(message, size, identity, seconds)
            else:
                total, count = torch.empty_like(message), message.numel()
                number = self._library.exchange(
                    self._handle, message.data_ptr(), total.data_ptr(), count, size, identity
                )
                if number in _AT_ONCE:
                    return total, number == -1 - _DONE
                if number < 0:
                    raise RuntimeError(self._words(_BROKEN))
                sent = Message(self, number, total)
                self._unsummed.append(sent)
            while not sent.is_done:
                self._finish_oldest(seconds)
        return sent.total, sent.is_same

    def _send_piece(
        self, message: Tensor, size: int, identity: int, seconds: float, *, is_zero: bool = False
    ) -> Message:
        """Publish what fits a buffer; called with the lock."""
        while len(self._unsummed) >= self._ahead:
            self._finish_oldest(seconds)
        sent = Message(self, 0, torch.empty_like(message))
        count = 0 if is_zero else sent.count
        sent.number = self._library.send(self._handle, message.data_ptr(), count, size, identity)
        if sent.number < 0:
            raise RuntimeError(self._words(_BROKEN))
        self._unsummed.append(sent)
        return sent

    def _send_pieces(
        self, message: Tensor, size: int, identity: int, seconds: float, *, is_zero: bool = False
    ) -> Message:
        """Send and sum a message that is larger than a buffer, piece by piece.

        All members make equally many pieces, or see by the first one that they do not agree.
        """
        flat, whole = message.view(-1), Message(self, 0, torch.empty_like(message))
        for start in range(0, size, self.capacity):
            piece = flat[start : start + self.capacity]
            # No larger than a buffer; `size` is that of the whole, for the comparison.
            with self._lock:
                sent = self._send_piece(piece, size, identity, seconds, is_zero=is_zero)
            whole.is_same = sent.wait(seconds)
            if not whole.is_same:
                break
            whole.total.view(-1)[start : start + self.capacity] = sent.total
        whole.is_done = True
        return whole

    def is_there(self, number: int) -> bool:
        """True once a message has come from all, or never will."""
        return bool(self._library.is_there(self._handle, number))

    def finish(self, message: Message, seconds: float) -> None:
        """Sum all messages up to this one."""
        with self._lock:
            while not message.is_done:
                self._finish_oldest(seconds)

    def give_up(self) -> None:
        """Have all members raise, now and at every later message."""
        self._library.give_up(self._handle)

    def _finish_oldest(self, seconds: float) -> None:
        """Sum the message that was sent first; called with the lock."""
        message, deadline = self._unsummed[0], time.monotonic() + seconds
        what = self._handle, message.number, message.total.data_ptr(), message.count
        while (state := self._library.sum(*what)) == _NOT_YET:
            # One that has the sum may end at once, and then the others have it as well.
            if self._gone() and self._missing(message):
                state = _LEFT
                break
            if time.monotonic() > deadline and (late := self._missing(message)):
                self.give_up()
                raise RuntimeError(f"Timed out waiting {seconds:g} s for {self._names(late)}")
        if state in (_BROKEN, _LEFT):
            words = self._words(state, message)
            self.give_up()
            raise RuntimeError(words)
        message.is_same, message.is_done = state == _DONE, True
        self._unsummed.popleft()

    def _missing(self, message: Message) -> list[int]:
        flags = ctypes.create_string_buffer(len(self._members))
        self._library.missing(self._handle, message.number, flags)
        return [r for r, flag in enumerate(flags.raw[: len(self._members)]) if flag]

    def _gone(self) -> list[int]:
        """The members whose processes have ended."""
        return [r for r, peer in enumerate(self._peers) if start_of(peer.pid) != peer.started]

    def _names(self, members: list[int]) -> str:
        return f"rank(s) {', '.join(str(self._members[r]) for r in members)}"

    def _words(self, state: int, message: Message | None = None) -> str:
        if self._handle is None:
            return FORKED
        if gone := self._gone():
            return f"remote process exited: {self._names(gone)}"
        if state == _LEFT and message is not None:
            left = self._names(self._missing(message))
            return f"remote process exited, or has destroyed the group: {left}"
        return "Connection closed by peer: another member has given up, or ended"


# By their groups, and held by nothing else for long: a mapping goes when its group does.
segments: weakref.WeakKeyDictionary[dist.ProcessGroup, Segment] = weakref.WeakKeyDictionary()
"""The segments of groups whose members are all on this host."""

segment_of: Callable[[dist.ProcessGroup], Segment | None] = segments.get


# For forked children.
_live: weakref.WeakSet[Segment] = weakref.WeakSet()


def _forget_all() -> None:
    for segment in list(_live):
        segment.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def map_first(me: int, said: list[Facts], fd: int) -> int | None:
    """Map the segment of the first of a host's members; None if it cannot be had.

    Args:
        me: the place of this one among them.
        said: the facts of each.
        fd: the segment that this one has made.
    """
    library = _functions()
    assert library is not None
    first = said[0]
    # On fewer cores than members, the one that spins keeps another from sending.
    cores = {core for facts in said for core in facts.cores}
    spin_seconds = _SPIN_SECONDS if len(cores) >= len(said) else 0.0
    own = fd
    with contextlib.suppress(OSError):
        if me:
            own = _open(first.pid, first.fd, first.token)
        try:
            return library.open(
                own,
                me,
                len(said),
                first.token.encode(),
                int(spin_seconds * 1e9),
                int(_NAP_SECONDS * 1e9),
            )
        finally:
            if me:
                os.close(own)
    return None


def close(handle: int) -> None:
    """Unmap what `map_first` has mapped, where no `Segment` has taken it over."""
    library = _functions()
    assert library is not None
    library.close(handle)
