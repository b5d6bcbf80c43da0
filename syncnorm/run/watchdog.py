"""A worker's surroundings: signals that ask it to stop, a limit on how long it may be stuck, a log
of its own.
"""

import faulthandler
import logging
import os
import signal
import time
from pathlib import Path
from types import FrameType

from syncnorm.run.interrupt import SAME_SIGNAL_SECONDS

# Between the stacks and the end: the other workers write theirs at about the same time.
_LAST_WORDS_SECONDS = 5.0
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class StuckLimit:
    """A limit on how long a worker may make no progress.

    A worker that makes none for `timeout_seconds` writes the stacks of its threads to `stacks` and
    is ended by SIGALRM, whatever it is doing: both work without the interpreter.

    Args:
        timeout_seconds: at least 1.
        stacks: where to.
    """

    def __init__(self, timeout_seconds: float, stacks: Path) -> None:
        self._timeout = timeout_seconds
        self._path = stacks
        self._stacks = stacks.open("w", encoding="utf-8")
        self._armed = 0.0
        self.alive()

    def alive(self) -> None:
        """Set the limit anew."""
        now = time.monotonic()
        # Not at each step of a millisecond: it starts a thread.
        if now - self._armed > self._timeout / 10:
            self._armed = now
            faulthandler.dump_traceback_later(self._timeout, file=self._stacks)
            signal.setitimer(signal.ITIMER_REAL, self._timeout + _LAST_WORDS_SECONDS)

    def close(self) -> None:
        """Lift the limit."""
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._stacks.close()
        if self._path.stat().st_size == 0:
            self._path.unlink()


class WorkerWatch(StuckLimit):
    """What a run asks and tells (see syncnorm.train.loop.Watch), as a process sees it.

    Args:
        timeout_seconds: at least 1.
        stacks: see `StuckLimit`.
    """

    def __init__(self, timeout_seconds: float, stacks: Path) -> None:
        self.stop: str | None = None
        self._asked = 0.0
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)
        super().__init__(timeout_seconds, stacks)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        # No exchange here: a worker that got no signal would not take part. The step's own exchange
        # tells the others.
        now = time.monotonic()
        # On a terminal Ctrl-C reaches a worker twice, from the terminal and, as SIGTERM, from the
        # launcher.
        if self.stop is not None and now - self._asked > SAME_SIGNAL_SECONDS:
            os._exit(128 + number)
        if self.stop is None:
            self.stop, self._asked = signal.Signals(number).name, now


def open_log(path: Path, is_first: bool) -> None:
    """Send this process's log, warnings included, to a file; the first worker's warnings to
    standard error too.
    """
    path.parent.mkdir(exist_ok=True)
    root = logging.getLogger()
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_LOG_FORMAT))
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    if is_first:
        screen = logging.StreamHandler()
        screen.setLevel(logging.WARNING)
        root.addHandler(screen)
    logging.captureWarnings(True)
