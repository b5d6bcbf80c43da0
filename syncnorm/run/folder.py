"""A run's folder and the note of how the run ended."""

import itertools
import json
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from syncnorm.errors import ConfigError
from syncnorm.train import strict_yaml
from syncnorm.train.config import Config
from syncnorm.train.files import write_text_whole


@dataclass(frozen=True)
class Exit:
    """How a run ended.

    Args:
        status: done, or failed.
        reason: why, in a sentence.
        step: optimizer steps done, as far as they are on record.
        exit_code: of the command.
    """

    status: Literal["done", "failed"]
    reason: str
    step: int
    exit_code: int

    def write(self, folder: Path) -> None:
        """Write `exit.json`."""
        write_text_whole(folder / "exit.json", json.dumps(asdict(self)) + "\n")


def make_run_folder(config: Config, name: str) -> Path:
    """Make `RUN_DIR/NAME-DATE-TIME` with the resolved configuration in it; never one that is there already.

    Raises:
        ConfigError: it cannot be made.
    """
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        root = Path(config.run_dir)
        root.mkdir(parents=True, exist_ok=True)
        folder = next(path for path in _candidates(root, stem) if _is_new(path))
        write_text_whole(folder / "config.yaml", strict_yaml.dump(config.model_dump()))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ConfigError(
            f"`run_dir` must be a folder that can be written to, got {config.run_dir!r}: {error}"
        ) from None
    return folder


def _candidates(root: Path, stem: str) -> itertools.chain[Path]:
    return itertools.chain([root / stem], (root / f"{stem}-{number}" for number in itertools.count(2)))


def _is_new(path: Path) -> bool:
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True
