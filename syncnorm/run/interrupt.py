"""Ctrl-C where a command does not simply end.

Elsewhere SIGINT ends it at once and quietly (see `__main__`).
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
"""Of a command that Ctrl-C has ended, in the shell."""

# A worker takes a second signal within this time for the first one, which reaches it from terminal
# and launcher.
SAME_SIGNAL_SECONDS = 2.0


class Interrupted(SignalException):
    """Ctrl-C in the launcher.

    Its workers are told by SIGTERM, for they ignore SIGINT while they import.
    """

    def __init__(self) -> None:
        super().__init__("interrupted", signal.SIGTERM)


@contextmanager
def as_keyboard_interrupt() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt inside the block, where something is to be cleared away or
    asked.

    Raises:
        SystemExit: of `STATUS`, if the block lets it pass.
    """
    with _handled(signal.default_int_handler):
        try:
            yield
        except KeyboardInterrupt:
            sys.exit(STATUS)


@contextmanager
def for_launcher() -> Iterator[None]:
    """Let Ctrl-C raise `Interrupted` inside the block, again only after `SAME_SIGNAL_SECONDS`."""
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
    # Only the main thread may; and what a launcher has set to be ignored stays so.
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, handler)  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
