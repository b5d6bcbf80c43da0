"""`exit.json`, the record of a run's end. Light: commands that only look at runs import no torch."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from syncnorm.train.files import read_regular, write_text_whole
from syncnorm.train.metrics import json_value


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
        text = json.dumps(json_value(facts), allow_nan=False)
        write_text_whole(folder / "exit.json", text + "\n")


def read_exit(folder: Path) -> Exit | None:
    """Read `exit.json`; None while the run goes on, or after it was killed."""
    try:
        end = Exit(**json.loads(read_regular(folder / "exit.json", follows_links=True)))
        step = int(end.step)
        metrics = {
            split: {name: float(value) for name, value in each.items()}
            for split, each in end.metrics.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return replace(end, step=step, metrics=metrics)
