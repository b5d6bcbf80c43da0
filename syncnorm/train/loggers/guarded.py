"""A logger in a thread of its own: whatever it raises, or wherever it hangs, training goes on."""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from syncnorm.errors import in_one_line

# More events than a logger that still works lets wait.
_MOST_WAITING = 1000


class GuardedLogger:
    """Makes a logger, feeds and closes it, in a thread. To be called from one thread.

    A logger that raises is dropped; what it raised is a fault, to be read once.

    Args:
        name: for messages.
        make: makes the logger, in its thread.
    """

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self._name, self._make = name, make
        self._waiting: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue()
        self._faults: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._is_dropped = False
        self._patience, self._deadline = 0.0, float("inf")
        # A daemon: one that hangs must not keep the process.
        self._thread = threading.Thread(target=self._work, name=f"syncnorm-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Hand figures over; nobody waits."""
        if self._is_dropped:
            return
        if self._waiting.qsize() >= _MOST_WAITING:
            self._drop(f"{_MOST_WAITING} steps behind")
        else:
            self._waiting.put((step, dict(figures)))  # its own: others have it, too

    def close(self, patience_seconds: float) -> None:
        """Ask the logger to end, which it does after the figures that are waiting.

        Args:
            patience_seconds: until it is left behind.
        """
        if self._deadline == float("inf"):
            self._waiting.put(None)
            self._patience = patience_seconds
            self._deadline = time.monotonic() + patience_seconds

    def is_over(self, seconds: float) -> bool:
        """Wait so long at most; True if the logger has ended, or has had its time."""
        self._thread.join(seconds)
        if not self._thread.is_alive():
            return True
        if not self._is_dropped and time.monotonic() >= self._deadline:
            self._drop(f"not closed within {self._patience:g} seconds")
        return self._is_dropped

    def pop_faults(self) -> list[str]:
        """Pop the messages about what went wrong."""
        return [self._faults.get() for _ in range(self._faults.qsize())]

    def _work(self) -> None:
        try:
            logger = self._make()
            while (event := self._waiting.get()) is not None and not self._is_dropped:
                logger.log(*event)
            logger.close()
        except BaseException as error:  # of somebody else's code; in this thread none is for us
            self._drop(in_one_line(error)[:500])

    def _drop(self, reason: str) -> None:
        if not self._is_dropped:
            self._is_dropped = True
            self._faults.put(f"logger {self._name} is dropped, the run goes on: {reason}")
