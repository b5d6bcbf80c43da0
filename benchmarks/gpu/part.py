"""What the parts share: how long they may take, and the rows that they write.

Without torch: a process of tests that needs none starts in a tenth of the time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """How a part is to be run."""

    rows: Path
    """The file for its rows, one JSON object a line; of equal keys the last counts."""
    until: float = float("inf")
    """When to end, by `time.monotonic`, which all processes share."""
    device: str = "cuda"
    is_small: bool = False
    """True to try the code, on sizes that give no figures."""

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def write(self, **row: Any) -> None:
        """Add a row. It is there at once, whatever becomes of the process."""
        with self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def attempt(self, function: Callable[[], dict[str, Any]], **key: Any) -> None:
        """Write the row that `function` returns; in place of one that raises, its error."""
        try:
            self.write(**key, **function())
        except Exception as error:  # another row may do
            self.write(**key, error=in_one_line(error))
            if is_device_lost():
                raise


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that a part has written so far; the last line may be half a row."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def in_one_line(error: BaseException) -> str:
    """The error's type and the beginning of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def is_device_lost() -> bool:
    """True if an error has left the device unusable to this process; another may use it."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def from_arguments(arguments: Sequence[str] | None = None) -> Settings:
    """The settings that the command gives to a part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("--until", type=float, default=float("inf"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args(arguments)
    return Settings(given.rows, given.until, given.device, given.small)


def as_arguments(settings: Settings) -> list[str]:
    """The other way round."""
    small = ["--small"] if settings.is_small else []
    until = ["--until", str(settings.until), "--device", settings.device]
    return [str(settings.rows), *until, *small]
