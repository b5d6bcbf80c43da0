"""Files that are either whole or absent, whenever the process dies."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under another name, bring it to disk, and rename it into place.

    Args:
        path: the file; one that exists is replaced.
        write: is handed the open file.
    """
    partial = path.with_name(f".tmp-{path.name}")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_text_whole(path: Path, text: str) -> None:
    """`write_whole` for a string."""
    write_whole(path, lambda file: file.write(text.encode()))


def _sync_folder(folder: Path) -> None:
    # The rename itself is durable only once the folder's entry is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
