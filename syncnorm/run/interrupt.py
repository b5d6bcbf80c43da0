"""Handlers of Ctrl-C for commands that have to clean up or ask.

All others end at once and quietly on SIGINT (see `__main__`).
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch.distributed.elastic.multiprocessing import SignalException

STATUS = 128 + signal.SIGINT
"""The exit status of a command that Ctrl-C has ended."""

# One Ctrl-C reaches a worker twice, from the terminal and from the launcher: signals within this
# time count as one.
SAME_SIGNAL_SECONDS = 2.0


class Interrupted(SignalException):
    """Ctrl-C in the launcher.

    The launcher sends SIGTERM to its workers, which ignore SIGINT while they import.
    """

    def __init__(self) -> None:
        super().__init__("interrupted", signal.SIGTERM)


@contextmanager
def as_keyboard_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt inside the block on Ctrl-C.

    Raises:
        SystemExit: with `STATUS`, if the block does not catch it.
    """
    with _handled(signal.default_int_handler):
        try:
            yield
        except KeyboardInterrupt:
            sys.exit(STATUS)


@contextmanager
def for_launcher() -> Iterator[None]:
    """Raise `Interrupted` inside the block on Ctrl-C, at most once in `SAME_SIGNAL_SECONDS`."""
    asked = float("-inf")

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        now = time.monotonic()
        if now - asked > SAME_SIGNAL_SECONDS:
            asked = now
            raise Interrupted

    with _handled(interrupt):
        yield


@contextmanager
def _handled(handler: object) -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    # Only the main thread may set handlers. A signal that a launcher ignores stays ignored.
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, handler)  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
