"""`exit.json`, the record of a run's end. Light: commands that only look at runs import no torch."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from syncnorm.train.files import write_text_whole


@dataclass(frozen=True)
class Exit:
    """End of a run.

    Args:
        status: done, stopped (saved, and can be resumed) or failed.
        reason: a sentence.
        step: optimizer steps done, as far as they are on record.
        exit_code: of the command.
        metrics: the last ones of each split; the one that decides comes first.
    """

    status: Literal["done", "stopped", "failed"]
    reason: str
    step: int
    exit_code: int
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write `exit.json`."""
        facts = asdict(self)
        if not self.metrics:
            del facts["metrics"]
        write_text_whole(folder / "exit.json", json.dumps(facts) + "\n")


def read_exit(folder: Path) -> Exit | None:
    """Read `exit.json`; None while the run goes on, or after it was killed."""
    try:
        return Exit(**json.loads((folder / "exit.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
