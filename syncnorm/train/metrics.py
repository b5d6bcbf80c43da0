"""The events of a run, one JSON object per line."""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from syncnorm.train.files import open_regular, regular

_log = logging.getLogger(__name__)


class MetricsFile:
    """A JSONL file of events; each line is with the operating system when `write` returns.

    On a full disk the lines that do not fit are lost, and the run goes on.

    Args:
        path: the file, or None for workers that do not write.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._is_complete = True
        if path is not None and path.exists():
            _drop_torn_line(path)

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
            json.dumps({"event": event, **json_value(values)}, allow_nan=False) + "\n"
            for event, values in events
        )
        try:
            if not self._is_complete:
                _drop_torn_line(self._path)
            _append(self._path, text.encode())
        except OSError as error:
            if self._is_complete:
                _log.error(
                    "%s: cannot be written, the run goes on without: %s", self._path, error.strerror
                )
            self._is_complete = False


def read_events(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read a run's events.

    Returns:
        The events in their order, and the number of lines that are none, as the last one after a
        kill may be.

    Raises:
        OSError: the file is there and cannot be read.
    """
    lines = list(each_event(path))
    events = [event for event in lines if event is not None]
    return events, len(lines) - len(events)


def each_event(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield a run's events, in their order, and None for a line that is none.

    Raises:
        OSError: the file is there and cannot be read.
    """
    with contextlib.suppress(FileNotFoundError), open_regular(path, follows_links=True) as file:
        for line in filter(bytes.strip, file):
            try:
                event = json.loads(line)
            # ValueError: not JSON, or not UTF-8; the other one: nested without end.
            except (ValueError, RecursionError):
                event = None
            is_event = isinstance(event, dict) and isinstance(event.get("event"), str)
            yield event if is_event else None


def last_step(path: Path) -> int:
    """Find the last optimizer step in a run's events; 0 if there is none to be read."""
    with contextlib.suppress(OSError):
        for event in reversed(read_events(path)[0]):
            if isinstance(event.get("step"), int):
                return event["step"]
    return 0


def _append(path: Path, data: bytes) -> None:
    """Write at the end of a file, which is closed again so that other machines see it.

    Once in each step: a file object takes twice the time.

    Raises:
        OSError: it could not be written; a part of it may be there.
    """
    descriptor = regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    finally:
        os.close(descriptor)


def _drop_torn_line(path: Path) -> None:
    """Cut off what a kill has left of a last line: the next must not be added to it.

    What reads the file line by line finds nothing but JSON.
    """
    with contextlib.suppress(OSError), open(path, "rb+", opener=regular) as file:
        if file.seek(0, 2) and file.seek(-1, 2) is not None and file.read(1) != b"\n":
            file.seek(0)
            data = file.read()
            begin = data.rfind(b"\n") + 1
            try:
                json.loads(data[begin:])
                file.write(b"\n")  # whole but for its end, as an editor leaves it
            except (ValueError, RecursionError):
                file.truncate(begin)


def json_value(value: Any) -> Any:
    """Write numbers that JSON does not have as "nan", "inf" and "-inf", which float() reads."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: json_value(one) for name, one in value.items()}
    return [json_value(one) for one in value] if isinstance(value, list | tuple) else value


def from_json_value(value: Any) -> Any:
    """Undo `json_value`, which a text of the same letters does not survive."""
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, dict):
        return {name: from_json_value(one) for name, one in value.items()}
    return [from_json_value(one) for one in value] if isinstance(value, list) else value
