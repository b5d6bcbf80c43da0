"""Handlers of Ctrl-C for commands that have to clean up or ask.

All others end at once and quietly on SIGINT (see `__main__`).
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int | None

STATUS = 128 + signal.SIGINT
"""The exit status of a command that Ctrl-C has ended."""

# One Ctrl-C reaches a worker twice, from the terminal and from the launcher: signals within this
# time count as one.
SAME_SIGNAL_SECONDS = 2.0


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""The signals that ask a launcher to stop."""


class Stopped(Exception):
    """A signal in the launcher.

    Args:
        number: of the signal.
    """

    number: signal.Signals

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)

    @property
    def passed_on(self) -> tuple[signal.Signals, ...]:
        """The signals for the workers, in their order.

        They ignore Ctrl-C at first, so SIGTERM comes after it. Once they listen, both count as one,
        whose name is the first's.
        """
        is_ignored = self.number == signal.SIGINT
        return (self.number, signal.SIGTERM) if is_ignored else (self.number,)


@contextmanager
def as_keyboard_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt inside the block on Ctrl-C.

    Raises:
        SystemExit: with `STATUS`, if the block does not catch it.
    """
    with handled(signal.default_int_handler, signal.SIGINT):
        try:
            yield
        except KeyboardInterrupt:
            sys.exit(STATUS)


@contextmanager
def for_launcher() -> Iterator[None]:
    """Raise `Stopped` inside the block on a signal to stop.

    At most once in `SAME_SIGNAL_SECONDS`: who ends a group of processes may signal each of them, and
    their launcher twice.
    """
    asked = float("-inf")

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        now = time.monotonic()
        if now - asked <= SAME_SIGNAL_SECONDS:
            return
        asked = now
        raise Stopped(number)

    with handled(stop, *STOP_SIGNALS):
        yield


@contextmanager
def handled(handler: Handler, *numbers: signal.Signals) -> Iterator[None]:
    """Handle signals within the block. Those that are ignored, as under nohup, stay so."""
    # Only the main thread may set handlers.
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers if is_main}
    before = {number: one for number, one in before.items() if one is not signal.SIG_IGN}
    put_handlers(dict.fromkeys(before, handler))
    try:
        yield
    finally:
        put_handlers(before)


def put_handlers(handlers: Mapping[signal.Signals, Handler]) -> None:
    """Set the handlers of signals; None, one that Python has not set, is the default."""
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
