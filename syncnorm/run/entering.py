"""The way of all workers into one run's folder: agreed on, checked and locked."""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path

from syncnorm.errors import ConfigError
from syncnorm.run.env import Launched
from syncnorm.run.folder import (
    check_resumable,
    find_relaunched,
    lock,
    make_run_folder,
    remove_unstarted,
)
from syncnorm.run.request import RunRequest, uses_store
from syncnorm.train.files import read_regular, written_whole
from syncnorm.train.waiting import from_all, from_first, in_thread_of_first

# On a network a new folder may take a while to show.
_VISIBLE_SECONDS = 5.0


@contextmanager
def open_run_folder(request: RunRequest, launched: Launched) -> Iterator[Path]:
    """Agree on the run's folder, check that all workers have the same request, and lock the folder.

    A folder that was made here is removed if the run is refused before it begins.

    *Collectives*: all_gather_objects and broadcasts; every worker must call.

    Raises:
        ConfigError: the workers' configurations differ, or the folder cannot be used, or not by all;
            on all workers.
    """
    answers = from_all(request.config.model_dump_json())
    different = [rank for rank, text in enumerate(answers) if text != answers[0]]
    if different:
        raise ConfigError(
            f"configuration {request.name!r} of workers {different} differs from that of worker 0"
        )
    made = None
    # In a thread, for a copy from a store may take longer than the others' collectives.
    choose = partial(_choose_folder, request, launched) if launched.rank == 0 else None
    chosen = in_thread_of_first(choose, lambda: None)

    def take() -> Path:
        nonlocal made
        assert chosen is not None
        mine, is_new = chosen.result()
        made = mine.absolute() if is_new else None
        # Made by a launcher on another machine.
        _check_shared(mine, [] if mine.is_dir() else [0])
        stack.enter_context(closing(lock(mine)))
        stack.enter_context(without_end(mine))
        return mine

    with ExitStack() as stack:
        try:
            named = from_first(chosen is not None, take)
            folder = named.absolute()
            lacking = [] if uses_store(request) else _without_folder(folder, chosen is not None)
            _check_shared(named, lacking)
            yield named
        except ConfigError:
            if made is not None:
                remove_unstarted(made)
            raise


def _check_shared(folder: Path, lacking: list[int]) -> None:
    if lacking:
        raise ConfigError(
            f"`run_dir` must be a folder that all machines share, got {str(folder)!r}, which workers "
            f"{lacking} do not see. Start them in one folder, or give a path that is the same"
        )


@contextmanager
def without_end(folder: Path) -> Iterator[None]:
    """Remove the record of the last end, for the run goes on; put it back if the run is refused."""
    path = folder.absolute() / "exit.json"
    try:
        before = read_regular(path, follows_links=True) if path.exists() else None
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run {str(folder)!r} must be writable, its exit.json too: {error.strerror}"
        ) from None
    try:
        yield
    except ConfigError:
        if before is not None and not path.exists():
            with suppress(OSError), written_whole(path) as file:
                file.write(before)
        raise


def _without_folder(folder: Path, is_first: bool) -> list[int]:
    """List the workers that do not see the run's folder. *Collectives*: a broadcast and a gathering.

    A copy of it, on a disk of the machine's own and under the same path, is another folder.
    """

    def put_mark() -> str:
        name = f".seen-{secrets.token_hex(8)}"
        try:
            (folder / name).touch()
        except OSError as error:
            raise ConfigError(f"run {str(folder)!r} must be writable: {error.strerror}") from None
        return name

    mark = folder / from_first(is_first, put_mark)
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not os.path.exists(mark) and time.monotonic() < deadline:  # noqa: PTH110 raises nothing
        time.sleep(0.1)
    seen = from_all(os.path.exists(mark))  # noqa: PTH110
    if is_first:
        with suppress(OSError):
            mark.unlink()
    return [rank for rank, sees in enumerate(seen) if not sees]


def _choose_folder(request: RunRequest, launched: Launched) -> tuple[Path, bool]:
    """Return the run's folder, and True if it is new.

    It is the one that our launcher made, the user named, or this launch made before; else a new
    one.
    """
    if launched.run_folder is not None:
        return launched.run_folder, False
    if request.resume is not None:
        return check_resumable(request.config, request.resume), False
    found = (
        None if launched.launch_id is None else find_relaunched(request.config, launched.launch_id)
    )
    if found is not None:
        return found, False
    return make_run_folder(request.config, request.name, launched.launch_id), True
