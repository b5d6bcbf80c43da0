"""Runs in a store: their address claimed when they begin, their copy fetched to go on from or use.

Whoever can write to a store decides what is in it. So names are checked, checkpoints verified as
those of a disk, and nothing lands outside of the run's own folder.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from syncnorm import system
from syncnorm.errors import CheckpointError, ConfigError
from syncnorm.train import files
from syncnorm.train.checkpoint.snapshot import MANIFEST
from syncnorm.train.checkpoint.store import BEST, CHECKPOINTS, CheckpointStore, read_mark
from syncnorm.train.config.section import check_path_or_url, is_url
from syncnorm.train.metrics import last_step
from syncnorm.train.storage import (
    LAST_RECORDS,
    LOCAL_ROOT,
    RECORDS,
    checkpoint_files,
    checkpoint_path,
    read_origin,
    write_origin,
)
from syncnorm.train.storage.remote import Remote, StorageError, within

_log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
# A store that answers at all does so sooner.
_ANSWER_SECONDS = 60.0


def claim(url: str, config: str) -> None:
    """Write a run's configuration to its address, which shows that it can be written to.

    Raises:
        ConfigError: it cannot, or the store does not answer.
    """
    within(_ANSWER_SECONDS, lambda: Remote(url).write("config.yaml", config.encode()), url)


def disclaim(folder: Path) -> None:
    """Remove from its address what a run that has not begun has left there, as far as possible."""
    url = read_origin(folder)
    if url is not None:
        with suppress(ConfigError):
            within(_ANSWER_SECONDS, lambda: Remote(url).remove(RECORDS), url)


def _checked(url: str) -> str:
    try:
        return check_path_or_url(url).rstrip("/")
    except ValueError as error:
        raise ConfigError(f"the address of a run {error}") from None


def read_config(url: str) -> str:
    """Read the configuration of a run in a store.

    Raises:
        ConfigError: the store refuses or does not answer, or there is no run.
    """
    url = _checked(url)
    remote = within(_ANSWER_SECONDS, lambda: Remote(url), url)
    text = within(_ANSWER_SECONDS, lambda: remote.read("config.yaml"), url)
    if text is None:
        raise ConfigError(f"there is no run at {url}: no config.yaml")
    return text.decode(errors="replace")


def _look(url: str) -> tuple[Remote, dict[str, int]]:
    """Open the address of a run, and list what is there, with its sizes.

    Raises:
        ConfigError: the store refuses or does not answer.
    """
    remote = within(_ANSWER_SECONDS, lambda: Remote(url), url)
    return remote, within(_ANSWER_SECONDS, remote.sizes, url)


def _whole(sizes: dict[str, int]) -> dict[int, dict[str, int]]:
    """The files of each checkpoint that has its manifest, by step."""
    return {s: each for s, each in checkpoint_files(sizes).items() if MANIFEST in each}


def check_not_behind(folder: Path) -> None:
    """Refuse to go on in a folder whose run another machine has taken further.

    The record and the configuration of that machine would be replaced in the store.

    Raises:
        ConfigError: the store has a later checkpoint. One that does not answer is passed over.
    """
    url = read_origin(folder)
    if url is None:
        return
    try:
        _, sizes = _look(url)
    except ConfigError as error:
        _log.warning("%s", error)
        return
    there = max(_whole(sizes), default=-1)
    # The record has the steps up to a checkpoint that was damaged there, too, and not fetched.
    record = last_step(folder / "metrics.jsonl")
    here = max(record, *CheckpointStore(folder / CHECKPOINTS).folders())
    if there > here:
        raise ConfigError(
            f"`--resume` must name what got furthest: {str(folder)!r} has step {here}, its "
            f"copy in the store step {there}. Go on from that: --resume {url}"
        )


def local_copy(source: str | Path) -> Path:
    """Return a run's folder on this machine; of a run in a store a copy, which it makes.

    The copy is `runs/NAME` in the working folder. It has the configuration, the record, and the
    newest checkpoint that is whole, with the best one. What is there already is not fetched again,
    and a run that got further here than in the store is left as it is.

    Args:
        source: a folder, or the address of a run such as `s3://bucket/runs/NAME`.

    Raises:
        ConfigError: the store refuses or does not answer, or there is no run.
    """
    if not is_url(str(source)):
        return Path(source)
    url = _checked(str(source))
    name = url.rpartition("/")[2]
    if not _NAME.fullmatch(name):
        raise ConfigError(f"the address of a run must end with its name, got {url!r}")
    remote, sizes = _look(url)
    if "config.yaml" not in sizes:
        raise ConfigError(f"there is no run at {url}: no config.yaml")
    folder = LOCAL_ROOT / name
    _check_free(folder, url)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(LOCAL_ROOT / f".{name}.lock"):
            write_origin(folder, url)
            _fetch(remote, sizes, folder)
    except (OSError, StorageError) as error:
        raise ConfigError(f"run {url} cannot be copied to {str(folder)!r}: {error}") from None
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other command of this machine makes the same copy."""
    with path.open("w") as file:
        with suppress(OSError):  # a file system without locks
            system.lock(file.fileno(), waits=True)
        yield


def _check_free(folder: Path, url: str) -> None:
    if folder.exists() and any(folder.iterdir()) and read_origin(folder) != url:
        raise ConfigError(
            f"{str(folder)!r} is in the way of a copy of {url}: it is another run's. "
            "Go to another working folder, or move it."
        )


def _fetch(remote: Remote, sizes: dict[str, int], folder: Path) -> None:
    store = CheckpointStore(folder / CHECKPOINTS)
    store.clean()
    there = _whole(sizes)
    _, newest, _ = store.newest()
    here = -1 if newest is None else int(newest.name.rpartition("-")[2])
    if max(there, default=-1) <= here and (folder / "config.yaml").exists():
        return  # this machine has got at least as far
    for name in (*RECORDS, *LAST_RECORDS):
        if name in sizes:
            _fetch_file(remote, name, folder / name)
    # The best first: once the newest is here, nobody looks again.
    mark = remote.read(f"{CHECKPOINTS}/{BEST}") if f"{CHECKPOINTS}/{BEST}" in sizes else None
    best = read_mark(mark)
    for step in best & there.keys() - store.folders().keys():
        _fetch_checkpoint(remote, step, there[step], store)
    if mark is not None and best:
        store.folder.mkdir(exist_ok=True)
        with files.written_whole(store.folder / BEST) as file:
            file.write(mark)
    # The newest that is good, and not the older ones.
    any(
        step <= here
        or step in store.folders()
        or _fetch_checkpoint(remote, step, there[step], store)
        for step in sorted(there, reverse=True)
    )


def _fetch_checkpoint(
    remote: Remote, step: int, sizes: dict[str, int], store: CheckpointStore
) -> bool:
    """Fetch and verify a checkpoint; False if it is damaged, and nothing is left of it."""
    target = store.folder / f"step-{step:08d}"
    temporary = target.with_name(f".tmp-{target.name}")
    files.remove(temporary)
    temporary.mkdir(parents=True)
    try:
        for name in sizes:
            remote.download(checkpoint_path(step, name), temporary / name)
        found = store.read(temporary).step
        if found != step:
            raise CheckpointError(f"`{temporary / MANIFEST}` must be of step {step}, got {found}")
        files.remove(target)
        temporary.rename(target)
    except (CheckpointError, StorageError) as error:
        # One that is gone was removed by a run that goes on.
        if isinstance(error, StorageError) and not isinstance(error.__cause__, FileNotFoundError):
            raise
        _log.warning("%s: checkpoint of step %d passed over: %s", remote.url, step, error)
        return False
    finally:
        files.remove(temporary)
    return True


def _fetch_file(remote: Remote, name: str, path: Path) -> None:
    partial = path.with_name(f".tmp-{path.name}")
    try:
        remote.download(name, partial)
        partial.replace(path)
    finally:
        files.remove(partial)
