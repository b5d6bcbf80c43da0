"""The checkpoints of a run on disk: each is whole or absent, whenever the process dies.

    CHECKPOINTS/step-00000012/   a snapshot's folder (`syncnorm.train.checkpoint.snapshot`)
    CHECKPOINTS/best.json        which step was marked as the best

A checkpoint is written under a name that starts with `.tmp-`, brought to disk, and renamed: that is
the moment from which it exists. Anything else with such a name is the remains of a writer that
died, and the next write removes it.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from syncnorm.errors import CheckpointError, InputError
from syncnorm.train import files
from syncnorm.train.checkpoint.snapshot import (
    MANIFEST,
    Snapshot,
    read_json,
    read_snapshot,
    write_snapshot,
)

# The folder of checkpoints within a run's folder.
CHECKPOINTS = "checkpoints"
BEST = "best.json"
# Prefix of a checkpoint that is being replaced, while neither it nor its successor is in place.
_ASIDE = ".tmp-old-"
_FOLDER = re.compile(rf"({re.escape(_ASIDE)})?step-([0-9]{{8,18}})")


class CheckpointStore:
    """The checkpoints of one run.

    Only one process writes; others may read meanwhile.

    Args:
        folder: made when the first checkpoint is written, in a folder that is there.
        keep: number of the newest to keep, besides the best one.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        if keep < 1:
            raise InputError(f"`keep` must be at least 1, got {keep}")
        self.folder = folder
        self._keep = keep

    def write(self, snapshot: Snapshot, *, is_best: bool = False) -> Path:
        """Write a checkpoint, which is on disk on return; then remove old ones.

        One of the same step is replaced as a whole; if it was marked as the best, it stays so.
        Checkpoints of later steps are left alone: a run that went back to an earlier one has yet to
        write them again.

        Returns:
            The checkpoint's folder.

        Raises:
            OSError: it could not be written; the checkpoints from before are as they were.
            InputError: the snapshot holds something that could not be read back.
        """
        if not self.folder.is_dir():
            # Not its parent's: a run's folder that is gone is not to come back without the rest.
            self.folder.mkdir(exist_ok=True)
            files.sync_folder(self.folder.parent)
        path = self.folder / _folder_name(snapshot.step)
        temporary = self.folder / f".tmp-{path.name}"
        with files.only_writer(self.folder):
            self._clean()
            try:
                write_snapshot(temporary, snapshot)
                # The mark comes first, and names the best one before as well, which holds until the
                # checkpoint is there: the other way round a kill in between would leave the best
                # one unmarked.
                if is_best:
                    self._mark_best(snapshot.step)
                self._put_in_place(temporary, path)
            except BaseException:
                files.remove(temporary)
                raise
            # The checkpoint is safe. What cannot be removed now takes space, and is tried again
            # next time.
            with suppress(OSError, CheckpointError):
                self._prune(snapshot.step)
        return path

    def clean(self) -> None:
        """Remove the remains of writers that died, unless a writer is at work; so does `write`."""
        with suppress(OSError, CheckpointError), files.only_writer(self.folder):
            self._clean()

    def read(self, path: Path) -> Snapshot:
        """Read a checkpoint, each file once: the verified bytes are the parsed bytes.

        Raises:
            CheckpointError: it is damaged, incomplete, has further files, or is no checkpoint.
        """
        snapshot = read_snapshot(path)
        if _step_of(path) not in (None, snapshot.step):
            raise CheckpointError(
                f"`{path / MANIFEST}` must be of step {_step_of(path)}, got step {snapshot.step}"
            )
        return snapshot

    def newest(self) -> tuple[Snapshot | None, Path | None, list[str]]:
        """Read the newest checkpoint that is good.

        Returns:
            The snapshot and its folder, or None and None; and a message about each newer one.

        Raises:
            CheckpointError: the folder of all checkpoints is there and cannot be listed.
        """
        faults: list[str] = []
        tried: set[_Found] = set()
        # Listed anew each time: one that is gone, or another one now, was pruned or replaced by a
        # writer meanwhile, and a newer one is there.
        while untried := {
            step: found
            for step, path in self.folders().items()
            if (found := _find(path)) not in tried
        }:
            found = untried[max(untried)]
            tried.add(found)
            try:
                return self.read(found.path), found.path, faults
            except CheckpointError as error:
                if found.identity is not None and _find(found.path) == found:
                    faults.append(str(error))
        return None, None, faults

    def best(self) -> Path | None:
        """Find the folder of the checkpoint marked as the best, if there is one.

        Raises:
            CheckpointError: the mark cannot be read.
        """
        path = self.folder / BEST
        if not _exists(path):
            return None
        mark = read_json(path, _Mark)
        folders = self.folders()
        steps = [step for step in (mark.step, mark.before) if step in folders]
        return folders[steps[0]] if steps else None

    def folders(self) -> dict[int, Path]:
        """List the checkpoints by step, unread.

        Of each the folder in place; or the one set aside, if a kill came while it was replaced.

        Raises:
            CheckpointError: the folder of all checkpoints is there and cannot be listed.
        """
        try:
            paths = list(self.folder.iterdir())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise CheckpointError(
                f"`{self.folder}` must be a folder of checkpoints: {error.strerror}"
            ) from None
        folders: dict[int, Path] = {}
        # Sorted, so that a folder in place comes after the one set aside, and holds.
        for path in sorted(paths):
            step = _step_of(path)
            if step is not None:
                folders[step] = path
        return folders

    def _clean(self) -> None:
        for path in self.folders().values():
            if path.name.startswith(_ASIDE):
                path.rename(path.with_name(path.name.removeprefix(_ASIDE)))
        for path in self.folder.glob(".tmp-*"):
            files.remove(path)

    def _mark_best(self, step: int) -> None:
        try:
            best = self.best()
        except CheckpointError:
            best = None
        mark = _Mark(step=step, before=None if best is None else _step_of(best))
        files.write_text_whole(self.folder / BEST, mark.model_dump_json() + "\n")

    def _put_in_place(self, temporary: Path, path: Path) -> None:
        aside = path.with_name(_ASIDE + path.name)
        is_replaced = _exists(path)
        if is_replaced:
            path.rename(aside)
        try:
            temporary.rename(path)
        except BaseException:
            if is_replaced:
                aside.rename(path)
            raise
        files.sync_folder(self.folder)
        if is_replaced:
            files.remove(aside)

    def _prune(self, step: int) -> None:
        # If the mark cannot be read this raises: any of them may be the best, and all stay.
        best = self.best()
        folders = self.folders()
        for old in sorted((each for each in folders if each <= step), reverse=True)[self._keep :]:
            if folders[old] != best:
                # Renamed first: a checkpoint that a kill left half removed would look damaged.
                gone = folders[old].rename(self.folder / f".tmp-gone-{folders[old].name}")
                files.remove(gone)


class _Found(NamedTuple):
    """A folder, and what tells it from another one that takes its place; None: it is not there."""

    path: Path
    identity: tuple[int, int] | None


def _find(path: Path) -> _Found:
    with suppress(OSError):
        status = path.lstat()
        return _Found(path, (status.st_ino, status.st_ctime_ns))
    return _Found(path, None)


class _Mark(BaseModel):
    """The mark of the best step; `before` holds until the checkpoint of `step` is in place."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    step: int
    before: int | None


def read_mark(data: bytes | None) -> set[int]:
    """Read the steps that a mark of the best names; empty without a mark that can be read."""
    try:
        mark = _Mark.model_validate_json(data or b"")
    except ValueError:
        return set()
    return {mark.step} if mark.before is None else {mark.step, mark.before}


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _step_of(path: Path) -> int | None:
    match = _FOLDER.fullmatch(path.name)
    if match is None or match[2] != f"{int(match[2]):08d}":
        return None
    return int(match[2])


def _exists(path: Path) -> bool:
    return path.is_symlink() or path.exists()
