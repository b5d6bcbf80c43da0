"""Files that are whole or absent, whenever the process dies; careful reading of others' files."""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from syncnorm import system
from syncnorm.errors import ConfigError


def open_to_write(path: Path) -> BinaryIO:
    """Open a file for writing; all writes of this module pass here, so a drill can count bytes.

    A link or a pipe in its place is replaced.
    """
    remove_link(path)
    return open(path, "wb", opener=regular)


def remove_link(path: Path) -> None:
    """Remove a link or a pipe where a file is to be written.

    A run's folder may be somebody else's: a link in it may lead to any file of the user's, and
    opening a pipe would wait.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            path.unlink()


def regular(path: str | Path, flags: int) -> int:
    """Open a file of a folder that somebody else may have made; an opener for `open`.

    Raises:
        OSError: it cannot be opened, or is a link, a folder, a pipe or a device.
    """
    try:
        # Non-blocking: opening a pipe would wait until somebody is at its other end.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        is_other = error.errno in (errno.ELOOP, errno.ENXIO)
        raise _not_regular(Path(path)) if is_other else error from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(Path(path))
    return descriptor


@contextlib.contextmanager
def written_whole(path: Path, *, to_disk: bool = True) -> Iterator[BinaryIO]:
    """Write a file under another name, bring it to disk, and rename it into place.

    Args:
        path: the file; one that exists is replaced once the block ends.
        to_disk: False for one of many that can be made again, if the machine fails.
    """
    partial = path.with_name(f".tmp-{path.name}")
    try:
        with (_synced if to_disk else open_to_write)(partial) as file:
            yield file
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if to_disk:
        sync_folder(path.parent)


def write_text_whole(path: Path, text: str) -> None:
    """`written_whole` for a string."""
    with written_whole(path) as file:
        file.write(text.encode())


def write_bytes_synced(path: Path, data: bytes) -> None:
    """Write a file in place and bring it to disk, but not yet its entry in the folder."""
    with _synced(path) as file:
        file.write(data)


def check_output(path: Path, name: str = "--output") -> None:
    """Refuse what a file that a user asks for must not take the place of.

    Raises:
        ConfigError: it is a device or a pipe, or a link to one that is open, as /dev/stdout is.
    """
    try:
        is_open_one = system.leads_to_open_file(path)
        is_other = stat.S_IFMT(path.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR)
    except OSError:  # not there, or not to be written, which shows then
        return
    if is_open_one or is_other:
        raise ConfigError(f"`{name}` must be a file, got {str(path)!r}, a device or a pipe")


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to disk: a rename is durable only once they are."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path, *, follows_links: bool = False) -> BinaryIO:
    """Open a file for reading that somebody else may have written.

    Args:
        path: the file.
        follows_links: True where what is read goes nowhere but to who reads it.

    Raises:
        OSError: it cannot be opened, or is a link, a folder, a pipe or a device.
    """
    if follows_links:
        path = Path(os.path.realpath(path))  # pathlib raises at links in a circle
    return os.fdopen(regular(path, os.O_RDONLY), "rb")


def read_regular(path: Path, *, follows_links: bool = False) -> bytes:
    """Read what `open_regular` opens."""
    with open_regular(path, follows_links=follows_links) as file:
        return file.read()


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, against all processes and threads on this machine.

    The lock ends with its process. Where a file system has no locks (some network file systems have
    none for folders) nobody is kept out.

    Raises:
        BlockingIOError: somebody else holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            system.unlock(descriptor)
        os.close(descriptor)


def _not_regular(path: Path) -> OSError:
    return OSError(errno.EINVAL, "Not a regular file", str(path))


def _lock(descriptor: int, folder: Path) -> None:
    try:
        system.lock(descriptor)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, "Somebody else is writing there", str(folder)) from None
    except OSError:
        pass


@contextlib.contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    with open_to_write(path) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
