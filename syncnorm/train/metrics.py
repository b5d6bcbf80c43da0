"""What happened in a run, one JSON object per line."""

import contextlib
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


class MetricsFile:
    """Append events to a JSONL file; each line is with the system when `write` returns.

    A disk that is full costs the lines that do not fit, not the run.

    Args:
        path: the file, or None for workers that do not write.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._is_complete = True
        if path is not None and path.exists():
            _close_torn_line(path)

    def write(self, event: str, **values: Any) -> None:
        """Append `{"event": event, **values}`."""
        self.write_all([(event, values)])

    def write_timed(self, event: str, **values: Any) -> None:
        """Append an event with the time, in seconds since 1970."""
        self.write(event, time=time.time(), **values)

    def write_all(self, events: list[tuple[str, dict[str, Any]]]) -> None:
        """Append several events at once."""
        if self._path is None or not events:
            return
        text = "".join(
            json.dumps({"event": event, **_json_value(values)}, allow_nan=False) + "\n"
            for event, values in events
        )
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            if self._is_complete:
                _log.error(
                    "%s: cannot be written, the run goes on without: %s", self._path, error.strerror
                )
            self._is_complete = False


def read_events(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read a run's events.

    Returns:
        The events in their order, and how many lines are none, as the last one after a kill may be.
    """
    events, torn = [], 0
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                events.append(event)
            else:
                torn += 1
    return events, torn


def last_step(path: Path) -> int:
    """Return the last optimizer step that a run has on record; 0 if there is none."""
    return next(
        (e["step"] for e in reversed(read_events(path)[0]) if isinstance(e.get("step"), int)), 0
    )


def _close_torn_line(path: Path) -> None:
    """After a kill the last line may lack its end; the next one must not be added to it."""
    with contextlib.suppress(OSError), path.open("rb+") as file:
        if file.seek(0, 2) and file.seek(-1, 2) is not None and file.read(1) != b"\n":
            file.write(b"\n")


def _json_value(value: Any) -> Any:
    # JSON has no infinities: a loss that is not finite becomes "nan" or "inf", which float() reads
    # back.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _json_value(one) for name, one in value.items()}
    return [_json_value(one) for one in value] if isinstance(value, list | tuple) else value
