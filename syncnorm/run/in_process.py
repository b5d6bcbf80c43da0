"""User code in the command's own process, imported and reported as in workers."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from syncnorm.errors import ConfigError, in_one_line
from syncnorm.run.errors import RunError


@contextmanager
def ends_are_errors() -> Iterator[None]:
    """Take what ends a program for an error: from code of a run, it would end a worker as done.

    Raises:
        RuntimeError: for a SystemExit or a KeyboardInterrupt.
    """
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"the worker's program was ended by {error!r}") from error


def add_working_folder_to_path() -> None:
    """Make modules of the working folder importable, as `python -m` does and a command does not."""
    here = str(Path.cwd())
    if not sys.flags.safe_path and not {"", here} & set(sys.path):
        sys.path.insert(0, here)


@contextmanager
def errors_in_one_line(rank: int = 0) -> Iterator[None]:
    """Report an exception as the launcher does, in one line.

    The line ends with the place of the error, where the launcher's names a file with the traceback.

    Raises:
        RunError: for all exceptions but those that are one line already; for a `sys.exit`, too,
            which would end a command as if it were done.
    """
    try:
        yield
    except (ConfigError, RunError):
        raise
    except (Exception, SystemExit) as error:
        text = in_one_line(error)
        raise RunError(f"worker {rank} failed: {text} ({_place(error)})") from error


def _place(error: BaseException) -> str:
    """Name the innermost line of user code; the innermost line if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    package = str(Path(__file__).parents[1])
    own = [
        f
        for f in frames
        if "site-packages" not in f.filename and not f.filename.startswith((package, "<"))
    ]
    frame = (own or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}, in {frame.name}"
