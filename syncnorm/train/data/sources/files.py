"""The files of a source: found under its folder, and cut into sets."""

import hashlib
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from syncnorm.errors import ConfigError
from syncnorm.train.data.sources.images import is_image

_log = logging.getLogger(__name__)

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}

_NAMES = {name for names in SPLITS.values() for name in names}


class Paths(Sequence[str]):
    """The paths of files below a folder, in three objects however many there are.

    Loader processes share memory with the worker until one of them writes, and Python writes a
    reference count into each object that it looks at.
    """

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.root = root
        self._joined = b"".join(encoded)
        self._ends = torch.tensor([0, *map(len, encoded)]).cumsum(0)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = self._ends[index : index + 2].tolist()
        return str(self.root / os.fsdecode(self._joined[start:stop]))


def split_folders(root: Path) -> dict[str, Path]:
    """Find the folders of `train`, `validation` and `test`, as far as they are there.

    Raises:
        ConfigError: it is no folder, or two folders are for one set.
    """
    present = list_folder(root, is_folder=True)
    # With capitals it may be a class, which holds images. Classes of other names are not listed.
    sets = [
        name
        for name in present
        if name in _NAMES
        or (
            name.casefold() in _NAMES
            and not any(map(is_image, list_folder(root / name, is_folder=False)))
        )
    ]
    names = choose_splits(sets, "folder", root)
    tell_left_out(present, names, root)
    return {split: root / name for split, name in names.items()}


def choose_splits(present: Collection[str], what: str, root: Path) -> dict[str, str]:
    """Choose the name of each set from those that are there, capitals or not.

    Args:
        present: the names.
        what: one of them is, for the message.
        root: where they are, for the message.

    Raises:
        ConfigError: two are for one set.
    """
    found: dict[str, str] = {}
    for split, names in SPLITS.items():
        some = sorted(name for name in present if name.casefold() in names)
        if len(some) > 1:
            raise ConfigError(
                f"`data.root` must hold one {what} for {split}, got {' and '.join(some)} in "
                f"{str(root)!r}"
            )
        if some:
            found[split] = some[0]
    return found


def tell_left_out(present: Collection[str], chosen: Mapping[str, str], root: Path) -> None:
    """Log the names beside a training set that are no set's."""
    left = sorted(set(present) - set(chosen.values()))
    if "train" in chosen and left:
        _log.warning("data.root: %s are no sets of %s, and left out", ", ".join(left), root)


def list_folder(folder: Path, *, is_folder: bool) -> list[str]:
    """List the names of folders, or of files, in a folder; sorted, without those hidden by a dot.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(
                entry.name
                for entry in entries
                if not entry.name.startswith(".")
                and (entry.is_dir() if is_folder else entry.is_file())
            )
    except OSError as error:
        raise ConfigError(
            f"`data.root` must hold folders that can be read, got {str(folder)!r}: {error.strerror}"
        ) from None


def by_stem(names: Collection[str], what: str, root: Path) -> dict[str, str]:
    """Map names of files without their suffixes to the names.

    Raises:
        ConfigError: two differ in their suffixes alone.
    """
    stems = {Path(name).stem: name for name in names}
    for name in names:
        other = stems[Path(name).stem]
        if other != name:
            raise ConfigError(
                f"`data.root` must hold one {what} of each name, got {name} and {other} in "
                f"{str(root)!r}"
            )
    return stems


def is_held_out(name: str, share: float) -> bool:
    """Decide by a hash of its name whether a sample is in the share that is cut off.

    Each sample is decided on by itself: further samples move no other.
    """
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def check_not_empty(split: str, count: int, where: object) -> None:
    """Refuse a set without samples."""
    if not count:
        raise ConfigError(f"`data.root` must leave samples for {split}, got none in {where}")
