"""Code that a person names, run in the process that was typed: found and reported as the workers
find and report it.
"""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from syncnorm.errors import ConfigError
from syncnorm.run.local import LocalRunError


def find_modules_here() -> None:
    """Have modules found in the working folder: `python -m` looks there, an installed command does
    not.
    """
    here = str(Path.cwd())
    if not sys.flags.safe_path and not {"", here} & set(sys.path):
        sys.path.insert(0, here)


@contextmanager
def told_in_a_line(rank: int = 0) -> Iterator[None]:
    """Tell a failure of this worker's as the launcher does, with its place where that names a file
    with the traceback.

    Raises:
        LocalRunError: whatever was raised, but for what is told in a line already.
    """
    try:
        yield
    except (ConfigError, LocalRunError):
        raise
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise LocalRunError(f"worker {rank} failed: {text} ({_place(error)})") from error


def _place(error: Exception) -> str:
    """Where it was raised; in code of a library, where that was called from."""
    frames = traceback.extract_tb(error.__traceback__)
    package = str(Path(__file__).parents[1])
    own = [
        f
        for f in frames
        if "site-packages" not in f.filename and not f.filename.startswith((package, "<"))
    ]
    frame = (own or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}, in {frame.name}"
