"""The copying of a run's folder to a store, in the background.

The record goes first, then the mark of the best checkpoint and that one, then the others, of each
the manifest last, then the end of the run. So what the store has is at every moment a run to go on
from: its newest whole checkpoint, the best one up to that, and the record of every step up to that.
"""

import queue
import threading
import time
from pathlib import Path

from syncnorm.errors import SyncnormError, in_one_line
from syncnorm.train.checkpoint.snapshot import MANIFEST
from syncnorm.train.checkpoint.store import BEST, CHECKPOINTS, CheckpointStore, read_mark
from syncnorm.train.files import read_regular
from syncnorm.train.storage import (
    LAST_RECORDS,
    RECORDS,
    checkpoint_files,
    checkpoint_path,
    read_origin,
)
from syncnorm.train.storage.remote import Remote

# At the end, when no later save tries again.
_LAST_TRIES = 3
_PAUSE_SECONDS = 2.0


class Mirror:
    """Copies a run's folder to its address whenever it is asked to. To be called from one thread.

    Args:
        folder: of the run.
        url: its address.
        keep: number of the newest checkpoints to keep there, besides the best one.
        patience_seconds: at the end, the longest time in which nothing moves.
    """

    def __init__(self, folder: Path, url: str, keep: int, patience_seconds: float = 60.0) -> None:
        self.url = url
        self._folder, self._keep, self._patience = folder, keep, patience_seconds
        self._asked, self._is_ending = threading.Event(), False
        self._faults: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._last_fault: str | None = None
        self._moved_at = time.monotonic()
        self._remote: Remote | None = None
        # By name, size and time of the local record that was copied; by step, the manifest. Copied
        # again if somebody has removed it there.
        self._records: dict[str, tuple[int, int]] = {}
        self._manifests: dict[int, bytes] = {}
        self._mark: bytes | None = None
        # A daemon: one that hangs must not keep the process.
        self._thread = threading.Thread(target=self._work, name="syncnorm-mirror", daemon=True)
        self._thread.start()

    def request(self) -> None:
        """Ask for a copy of what there is by now; nobody waits."""
        self._asked.set()

    def close(self) -> None:
        """Ask for a last copy, and for the end."""
        self._moved()
        self._is_ending = True
        self._asked.set()

    def is_over(self, seconds: float) -> bool:
        """Wait so long at most; True if all is copied, or there is no hope for it."""
        self._thread.join(seconds)
        if not self._thread.is_alive():
            return True
        if time.monotonic() - self._moved_at < self._patience:
            return False
        self._add_fault(f"nothing has moved for {self._patience:g} seconds", is_last=True)
        return True

    def pop_faults(self) -> list[str]:
        """Pop the messages about copies that failed."""
        return [self._faults.get() for _ in range(self._faults.qsize())]

    def _work(self) -> None:
        while True:
            self._asked.wait()
            self._asked.clear()
            # What is there before `close` is called is in the copy that begins now.
            is_last = self._is_ending
            fault = self._try(_LAST_TRIES if is_last else 1, is_last)
            # A store that is away is told of once, and at the end.
            if fault is not None and (is_last or fault != self._last_fault):
                self._add_fault(fault, is_last)
            self._last_fault = fault
            if is_last:
                return

    def _try(self, times: int, is_last: bool) -> str | None:
        """Copy, so many times until it goes well; return what went wrong at last."""
        fault = None
        for number in range(times):
            if number:
                time.sleep(_PAUSE_SECONDS)
            try:
                self._copy(is_last)
            except Exception as error:  # of the disk or the store
                fault = str(error) if isinstance(error, SyncnormError) else in_one_line(error)[:300]
            else:
                return None
        return fault

    def _add_fault(self, message: str, is_last: bool) -> None:
        after = "what is here is whole" if is_last else "the next save tries again"
        self._faults.put(f"{self._folder} is not copied: {message}; {after}")

    def _moved(self) -> None:
        self._moved_at = time.monotonic()

    def _copy(self, is_last: bool) -> None:
        if self._remote is None:
            self._remote = Remote(self.url)
        remote = self._remote
        names = remote.sizes()
        self._moved()
        self._copy_records(remote, RECORDS, names)
        store = CheckpointStore(self._folder / CHECKPOINTS)
        local = store.folders()
        # Read after the list: whatever is on it has been judged.
        mark = _read(self._folder / CHECKPOINTS / BEST)
        best = read_mark(mark)
        if mark is not None and (mark != self._mark or f"{CHECKPOINTS}/{BEST}" not in names):
            remote.write(f"{CHECKPOINTS}/{BEST}", mark)
            self._mark = mark
        newest = max(local, default=0)
        # The best first: a run that goes on from a newer one does not mark it again.
        for step in sorted(local, key=lambda s: (s in best, s == newest, s), reverse=True):
            self._copy_checkpoint(remote, step, local[step], names)
            if self._asked.is_set() and not is_last:
                break  # and begin again, with what is newer
        # If the mark cannot be read, or is in the store alone, any of them may be the best.
        is_unmarked = mark is None and f"{CHECKPOINTS}/{BEST}" not in names
        if local and (best or is_unmarked):
            self._prune(remote, newest, best)
        if is_last or not self._asked.is_set():
            self._copy_records(remote, LAST_RECORDS, names)

    def _copy_records(
        self, remote: Remote, records: tuple[str, ...], names: dict[str, int]
    ) -> None:
        for name in records:
            path = self._folder / name
            try:
                facts = path.stat()
                data = read_regular(path)
            except FileNotFoundError:
                if name in names:  # such as the end of a run that goes on
                    remote.remove([name])
                continue
            if name.endswith(".jsonl"):
                data = data[: data.rfind(b"\n") + 1]  # without a line that is being written
            now = (facts.st_size, facts.st_mtime_ns)
            if self._records.get(name) != now or name not in names:
                remote.write(name, data)
                self._records[name] = now
                self._moved()

    def _copy_checkpoint(
        self, remote: Remote, step: int, folder: Path, names: dict[str, int]
    ) -> None:
        manifest = _read(folder / MANIFEST)
        if manifest is None:
            return
        there = checkpoint_files(names).get(step, {})
        if MANIFEST in there:
            if self._manifests.get(step) == manifest:
                return
            if remote.read(checkpoint_path(step, MANIFEST)) == manifest:
                self._manifests[step] = manifest
                return
            remote.remove([checkpoint_path(step, MANIFEST)])
        try:
            # A link in somebody else's folder may lead to any file of the user's.
            files = sorted(
                path for path in folder.iterdir() if path.name != MANIFEST and not path.is_symlink()
            )
            for path in files:
                remote.upload(path, checkpoint_path(step, path.name), self._moved)
                self._moved()
        except Exception:
            if _read(folder / MANIFEST) != manifest:
                return  # removed or replaced meanwhile
            raise
        extra = there.keys() - {path.name for path in files} - {MANIFEST}
        remote.remove([checkpoint_path(step, name) for name in extra])
        remote.write(checkpoint_path(step, MANIFEST), manifest)
        self._manifests[step] = manifest
        self._moved()

    def _prune(self, remote: Remote, newest: int, best: set[int]) -> None:
        """Remove old checkpoints as the store on disk does; never later ones."""
        there = {s: files for s, files in checkpoint_files(remote.sizes()).items() if s <= newest}
        whole = sorted((step for step, files in there.items() if MANIFEST in files), reverse=True)
        for step in there.keys() - {*whole[: self._keep], *best}:
            # The manifest first: what is half removed must not look damaged.
            rest = there[step].keys() - {MANIFEST}
            remote.remove([checkpoint_path(step, name) for name in (MANIFEST, *rest)])
            self._manifests.pop(step, None)
            self._moved()


def open_mirror(folder: Path, keep: int, patience_seconds: float) -> Mirror | None:
    """Open the mirror of a run's folder, if it has an address."""
    url = read_origin(folder)
    return None if url is None else Mirror(folder, url, keep, patience_seconds)


def _read(path: Path) -> bytes | None:
    try:
        return read_regular(path)
    except FileNotFoundError:
        return None
