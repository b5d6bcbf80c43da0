"""User code in the command's own process, imported and reported as in workers."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from syncnorm.errors import ConfigError
from syncnorm.run.errors import LocalRunError


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
        LocalRunError: for all exceptions but those that are one line already.
    """
    try:
        yield
    except (ConfigError, LocalRunError):
        raise
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise LocalRunError(f"worker {rank} failed: {text} ({_place(error)})") from error


def _place(error: Exception) -> str:
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
