"""Runs in a store such as S3, through fsspec.

A run is local, as any other. Its folder is copied to an address (`mirror`) as it goes on, and from
there to another machine (`fetch`). `remote` has the operations on a store.
"""

import json
import re
import reprlib
from pathlib import Path
from typing import TypeGuard

from syncnorm.errors import ConfigError
from syncnorm.train.checkpoint.store import CHECKPOINTS
from syncnorm.train.config.section import check_path_or_url, is_url
from syncnorm.train.files import read_regular, write_text_whole

# In the run's folder: the address that it is copied to.
ORIGIN = "storage.json"
# Of runs with an address, in the working folder.
LOCAL_ROOT = Path("runs")

# A file of a checkpoint in a store; its step and its own name.
_CHECKPOINT_FILE = re.compile(
    rf"{CHECKPOINTS}/step-([0-9]{{8,18}})/([a-z][a-z0-9_]{{0,63}}\.(safetensors|pt|json))", re.ASCII
)
# Files of a run that are copied as they are: before its checkpoints, and after them.
RECORDS = ("config.yaml", "launch.json", "loggers.json", "metrics.jsonl")
LAST_RECORDS = ("report.html", "traceback.txt", "exit.json")


def write_origin(folder: Path, url: str) -> None:
    """Write down the address that a run's folder is copied to."""
    write_text_whole(folder / ORIGIN, json.dumps({"url": url}) + "\n")


def read_origin(folder: Path) -> str | None:
    """Read the address that a run's folder is copied to; None if there is none.

    Raises:
        ConfigError: it is not the address of this run. The folder may be somebody else's, or a copy.
    """
    try:
        url = json.loads(read_regular(folder / ORIGIN))["url"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        url = None
    if not _is_address_of(url, folder):
        raise ConfigError(
            f"{folder / ORIGIN}: must hold the address of a run called {folder.absolute().name!r}, "
            f"got {reprlib.repr(url)}. Remove the file to go on without a copy in a store."
        )
    return url


def _is_address_of(url: object, folder: Path) -> TypeGuard[str]:
    try:
        return (
            isinstance(url, str)
            and is_url(check_path_or_url(url))
            and url.rpartition("/")[2] == folder.absolute().name
        )
    except ValueError:
        return False


def checkpoint_files(names: dict[str, int]) -> dict[int, dict[str, int]]:
    """Sort the files of a run in a store by checkpoints.

    Args:
        names: of the files, with their sizes in bytes.

    Returns:
        By step, its files with their sizes. One without a manifest is not whole.
    """
    found: dict[int, dict[str, int]] = {}
    for name, size in names.items():
        match = _CHECKPOINT_FILE.fullmatch(name)
        if match is not None and match[1] == f"{int(match[1]):08d}":
            found.setdefault(int(match[1]), {})[match[2]] = size
    return found


def checkpoint_path(step: int, name: str) -> str:
    """Return the name of a file of a checkpoint in a store."""
    return f"{CHECKPOINTS}/step-{step:08d}/{name}"
