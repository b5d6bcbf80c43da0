"""Watchdog, stop signals and log file of a worker."""

import faulthandler
import logging
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from syncnorm.run.interrupt import SAME_SIGNAL_SECONDS, put_handlers
from syncnorm.train.files import remove_link

# Between the stack dump and the end: the other workers dump theirs at about the same time.
_LAST_WORDS_SECONDS = 5.0
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Watchdog:
    """Limit on the time that a worker makes no progress.

    After `timeout_seconds` without a call of `alive`, the worker writes the stacks of its threads
    to `stacks` and is ended by SIGALRM. Neither needs the interpreter, which may be stuck.

    Args:
        timeout_seconds: at least 1.
        stacks: path of the file for the stacks.
    """

    def __init__(self, timeout_seconds: float, stacks: Path) -> None:
        self._timeout = timeout_seconds
        self._path = stacks
        # After those of an attempt before this one.
        remove_link(stacks)
        self._stacks = stacks.open("a", encoding="utf-8")
        self._armed = 0.0
        self.alive()

    def alive(self) -> None:
        """Report progress: restart the timer."""
        now = time.monotonic()
        # Not at each short step, because this starts a thread.
        if now - self._armed > self._timeout / 10:
            self._armed = now
            faulthandler.dump_traceback_later(self._timeout, file=self._stacks)
            signal.setitimer(signal.ITIMER_REAL, self._timeout + _LAST_WORDS_SECONDS)

    def close(self) -> None:
        """Stop the timer, and remove an empty file of stacks."""
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._stacks.close()
        with suppress(FileNotFoundError):  # somebody has removed the folder
            if self._path.stat().st_size == 0:
                self._path.unlink()


class SignalWatch(Watchdog):
    """Implementation of `syncnorm.train.loop.Watch` for a process: signals ask it to stop.

    Args:
        timeout_seconds: at least 1.
        stacks: see `Watchdog`.
    """

    def __init__(self, timeout_seconds: float, stacks: Path) -> None:
        self.stop: str | None = None
        self._asked = 0.0
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        self._before = {
            number: signal.signal(number, self._handle_signal)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        super().__init__(timeout_seconds, stacks)

    def leave_signals(self) -> None:
        """Give the signals back, for a process that goes on."""
        put_handlers(self._before)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        # No collective here: a worker without the signal would not take part. The stop flag in the
        # step's all-reduce informs the others.
        now = time.monotonic()
        # Ctrl-C reaches a worker thrice, from the terminal, from the launcher, and as SIGTERM.
        if self.stop is not None and now - self._asked > SAME_SIGNAL_SECONDS:
            os._exit(128 + number)
        if self.stop is None:
            self.stop, self._asked = signal.Signals(number).name, now


class _FileHandler(logging.FileHandler):
    """A handler that says nothing where there is no room for a line: the run says what fails."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


def open_log(path: Path, is_first: bool) -> None:
    """Log to a file, warnings included; the first worker's warnings go to standard error too."""
    path.parent.mkdir(exist_ok=True)
    remove_link(path)
    root = logging.getLogger()
    handler = _FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_LOG_FORMAT))
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    if is_first:
        screen = logging.StreamHandler()
        screen.setLevel(logging.WARNING)
        root.addHandler(screen)
    logging.captureWarnings(True)
