"""What happened in a run, one JSON object per line."""

import json
import math
from pathlib import Path
from typing import Any


class MetricsFile:
    """Append events to a JSONL file; each line is on its way to the disk when `write` returns.

    Args:
        path: the file, or None for workers that do not write.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def write(self, event: str, **values: Any) -> None:
        """Append `{"event": event, **values}`."""
        if self._path is not None:
            values = {name: _json_value(value) for name, value in values.items()}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"event": event, **values}, allow_nan=False) + "\n")


def last_step(path: Path) -> int:
    """Return the last optimizer step that a run has on record; 0 if there is none."""
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8").splitlines()
    return json.loads(lines[-1])["step"] if lines else 0


def _json_value(value: Any) -> Any:
    # JSON has no infinities: a loss that is not finite becomes "nan" or "inf", which float() reads back.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
