"""Checkpoints written in the background, while training goes on."""

import time
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

from syncnorm.errors import CheckpointError
from syncnorm.train.checkpoint.snapshot import Snapshot
from syncnorm.train.checkpoint.store import CheckpointStore


@dataclass(frozen=True)
class SaveResult:
    """The result of a save.

    Args:
        step: of the snapshot.
        path: the checkpoint's folder; None if the save failed.
        seconds: time that writing took.
        error: the reason of a failure; None if there was none.
    """

    step: int
    path: Path | None
    seconds: float
    error: str | None


class BackgroundSaver:
    """Writes one checkpoint at a time in a thread of its own. To be called from one thread.

    At the interpreter's exit a save that is under way is finished first. Who ends the process in
    another way (`os._exit`) calls `wait` before.

    Args:
        store: the run's checkpoints.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="syncnorm-save")
        self._saves: list[futures.Future[SaveResult]] = []

    def start(self, snapshot: Snapshot, *, is_best: bool = False) -> bool:
        """Copy the snapshot to the CPU, and write the copy in the background.

        The thread that writes waits for the device, not this one.

        Returns:
            False, and nothing is done, if the last checkpoint is still being written.

        Raises:
            InputError: the snapshot holds something that could not be read back.
        """
        if self._saves and not self._saves[-1].done():
            return False
        self._saves.append(self._thread.submit(self._save, snapshot.on_cpu(), is_best))
        return True

    def wait(self, seconds: float | None = None) -> None:
        """Wait until no save is under way, or for so many seconds."""
        futures.wait(self._saves, seconds)

    def pop_results(self) -> list[SaveResult]:
        """Pop the results of finished saves, in their order.

        A full disk is such a result; the checkpoints from before are as they were.

        Raises:
            InputError: a snapshot held something that cannot be written.
        """
        ended = [save for save in self._saves if save.done()]
        self._saves = [save for save in self._saves if save not in ended]
        return [save.result() for save in ended]

    def _save(self, snapshot: Snapshot, is_best: bool) -> SaveResult:
        started = time.perf_counter()
        path, error = None, None
        try:
            path = self._store.write(snapshot, is_best=is_best)
        except (OSError, MemoryError, CheckpointError) as fault:
            reason = str(fault) or "out of memory"
            error = f"step {snapshot.step} could not be saved in {self._store.folder}: {reason}"
        return SaveResult(snapshot.step, path, time.perf_counter() - started, error)
