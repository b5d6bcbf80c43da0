"""A folder in a store, through fsspec: its files listed, read, written and removed.

Names are relative to the folder. An object is there when its write returns, whole; that the
manifest of a checkpoint is written last makes checkpoints so, too.
"""

import queue
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from syncnorm.errors import ConfigError, SyncnormError, in_one_line

T = TypeVar("T")


class StorageError(SyncnormError):
    """An operation on a store failed; the message is a line that names the address."""


class Remote:
    """A folder in a store.

    fsspec's objects do not live on in a fork: each process makes its own.

    Args:
        url: its address.

    Raises:
        ConfigError: the store is unknown, or its package is missing.
    """

    url: str

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._files, self._root = _open(self.url)

    def sizes(self) -> dict[str, int]:
        """List all files in the folder, with their sizes in bytes; empty if it is not there."""
        with self._translated("list"):
            self._files.invalidate_cache()
            found = self._files.find(self._root, detail=True)
        prefix = self._root.strip("/") + "/"
        return {
            path.strip("/").removeprefix(prefix): int(facts.get("size") or 0)
            for path, facts in found.items()
            if path.strip("/").startswith(prefix)
        }

    def read(self, name: str) -> bytes | None:
        """Read a file; None if it is not there."""
        with self._translated(f"read {name} at"):
            try:
                return self._files.cat_file(self._path(name))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Write a file, which is there on return; one that exists is replaced."""
        with self._translated(f"write {name} to"):
            self._in_made_folder(name, lambda path: self._files.pipe_file(path, data))

    def upload(self, local: Path, name: str, moved: Callable[[], object]) -> None:
        """Copy a local file to the store.

        Args:
            local: the file.
            name: for it.
            moved: called whenever a piece has gone.
        """
        callback = _callback(moved)
        with self._translated(f"write {name} to"):
            self._in_made_folder(
                name, lambda path: self._files.put_file(str(local), path, callback=callback)
            )

    def download(self, name: str, local: Path) -> None:
        """Copy a file of the store to a local one."""
        with self._translated(f"read {name} at"):
            self._files.get_file(self._path(name), str(local))

    def remove(self, names: Collection[str]) -> None:
        """Remove files; those that are not there do not matter."""
        with self._translated("remove files at"):
            for name in names:
                with suppress(FileNotFoundError):
                    self._files.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _in_made_folder(self, name: str, write: Callable[[str], object]) -> None:
        """Write a file, and make its folder where the store has real folders.

        Not at first, and only in what is there: it might make a bucket.
        """
        path = self._path(name)
        try:
            write(path)
        except FileNotFoundError:
            top = path[: path.find("/", 1)]
            if not self._files.exists(top):
                raise
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            write(path)

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each store has its own
            raise StorageError(f"cannot {what} {self.url}: {in_one_line(error)[:300]}") from error


def within(seconds: float, call: Callable[[], T], url: str) -> T:
    """Return what a call returns, or give it up.

    Raises:
        ConfigError: the store has not answered in time, or refuses.
    """
    answer: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answer.put((call(), None))
        except BaseException as error:
            answer.put((None, error))

    # A daemon: one that hangs must not keep the process.
    threading.Thread(target=work, daemon=True).start()
    try:
        result, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise ConfigError(f"no answer from {url} within {seconds:g} seconds") from None
    if isinstance(error, StorageError):
        raise ConfigError(
            f"{error}. The place must be there, and the store's own library must find the name and "
            "the key to it."
        ) from None
    if error is not None:
        raise error
    return result  # pyright: ignore[reportReturnType] there is one where there is no error


def _open(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ConfigError(
            f"{url} needs fsspec. Install it with: pip install 'syncnorm[storage]'"
        ) from None
    try:
        # skip: instances are shared between threads otherwise, with what they have listed.
        files, root = url_to_fs(url, skip_instance_cache=True)
    except ImportError as error:
        raise ConfigError(f"{url} needs a package that is not installed: {error}") from None
    except Exception as error:  # each store has its own
        raise ConfigError(f"{url} cannot be opened: {in_one_line(error)[:300]}") from None
    return files, root.rstrip("/")


def _callback(moved: Callable[[], object]) -> Any:
    from fsspec.callbacks import Callback

    class Moved(Callback):
        def call(self, *args: Any, **kwargs: Any) -> None:
            moved()

    return Moved()
