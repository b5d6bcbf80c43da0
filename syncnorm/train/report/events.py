"""Reader of `metrics.jsonl`, which may be damaged.

A run that was killed may have torn its last line, and a run that went on from a checkpoint records
steps again. So lines that are no event are counted and left out, and of several records of a
step the last one counts. Missing or unknown events and fields are not errors.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from syncnorm.errors import ConfigError
from syncnorm.train.metrics import each_event
from syncnorm.train.report.predictions import Predictions, read_predictions

# By event, the fields that are curves over the optimizer's steps.
_CURVES = {
    "step": ("loss", "lr", "grad_norm"),
    "interval": ("samples_per_second", "exchange_share", "memory"),
    "epoch": (),
    "evaluation": (),
    "end": (),
}
# Events with metrics, which tasks name.
_EVALUATED = ("epoch", "evaluation", "end")
# The file may be anybody's, and names go into the page.
_METRIC = re.compile(r"(validation|test)_\w[\w .,:@/%+()-]{0,60}")
_MOST_METRICS = 40
_KNOWN = {*_CURVES, "start", "layers", "checkpoint", "fault", "predictions"}

_MOST_CHARACTERS = 1000

Layers = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Mark:
    """A restart, fault or checkpoint.

    Args:
        kind: restart, fault or checkpoint.
        step: optimizer steps done.
        seconds: since the first event that has a time; None if unknown.
        detail: a fault's kind, what was resumed from, or a checkpoint's name.
        message: from the record.
    """

    kind: Literal["restart", "fault", "checkpoint"]
    step: int
    seconds: float | None
    detail: str
    message: str


@dataclass
class Events:
    """Everything on record about a run.

    Args:
        curves: by name, the value at each step.
        layers: by step, the statistics of each normalisation layer.
        marks: restarts, faults and checkpoints, in the order of the file.
        starts: the `start` events.
        last_step: of the last record.
        highest_step: of all its attempts.
        attempts: first and last time of each start of the run.
        epoch_seconds: by step, how long the epoch took.
        predictions: the last of a classifier.
        torn: lines that are no event.
    """

    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    layers: dict[int, Layers] = field(default_factory=dict)
    marks: list[Mark] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    last_step: int = 0
    highest_step: int = 0
    attempts: list[tuple[float, float]] = field(default_factory=list)
    epoch_seconds: dict[int, float] = field(default_factory=dict)
    predictions: Predictions | None = None
    torn: int = 0

    def curve(self, name: str) -> dict[int, float]:
        """The values of a curve by step; empty if nothing is on record."""
        return self.curves.get(name, {})

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics on record, such as `test_accuracy`; those of validation first."""
        found = [name for name in self.curves if _METRIC.fullmatch(name)][:_MOST_METRICS]
        return sorted(found, key=lambda name: name.startswith("test_"))

    @property
    def seconds(self) -> float | None:
        """Working time of the run: its attempts, without the pauses between them."""
        if self.attempts:
            return sum(max(0.0, last - first) for first, last in self.attempts)
        return sum(self.epoch_seconds.values()) if self.epoch_seconds else None

    def add(self, event: dict[str, Any]) -> None:
        """Add the event of the next line."""
        kind, step = _text(event.get("event")), _whole(event.get("step"))
        if kind not in _KNOWN:
            return
        self._add_time(kind == "start", _finite(event.get("time")))
        if step is not None:
            self.last_step = step
            self.highest_step = max(self.highest_step, step)
            self._add_values(kind, step, event)
        if kind in ("start", "fault", "checkpoint"):
            self._add_mark(kind, step or 0, event)

    def _add_time(self, is_start: bool, time: float | None) -> None:
        if time is None:
            return
        if is_start or not self.attempts:
            self.attempts.append((time, time))
        else:
            self.attempts[-1] = (self.attempts[-1][0], time)

    def _add_values(self, kind: str, step: int, event: dict[str, Any]) -> None:
        metrics = [n for n in event if _METRIC.fullmatch(n)] if kind in _EVALUATED else []
        for name in (*_CURVES.get(kind, ()), *metrics[:_MOST_METRICS]):
            value = number(event.get(name))
            if value is not None:
                self.curves.setdefault(name, {})[step] = value
        seconds = _finite(event.get("seconds"))
        if kind == "epoch" and seconds is not None:
            self.epoch_seconds[step] = seconds
        if kind == "layers":
            self.layers[step] = _layers(event.get("layers"))
        if kind == "predictions":
            self.predictions = read_predictions(event)

    def _add_mark(self, kind: str, step: int, event: dict[str, Any]) -> None:
        time = _finite(event.get("time"))
        seconds = None if time is None else time - self.attempts[0][0]
        if kind == "start":
            if self.starts or step > 0:
                self.marks.append(
                    Mark("restart", step, seconds, _text(event.get("resumed_from")), _origin(event))
                )
            self.starts.append(event)
        elif kind == "fault":
            self.marks.append(
                Mark(
                    "fault",
                    step,
                    seconds,
                    _text(event.get("kind")) or "unknown",
                    _text(event.get("message")),
                )
            )
        else:
            self.marks.append(Mark("checkpoint", step, seconds, _text(event.get("path")), ""))


def read_events(path: Path) -> Events:
    """Read `metrics.jsonl`; a file that is not there yet has no events.

    Raises:
        ConfigError: it cannot be read.
    """
    events = Events()
    try:
        for event in each_event(path):
            if event is None:
                events.torn += 1
            else:
                events.add(event)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    return events


def number(value: Any) -> float | None:
    """Read a number as metrics write it: those that are not finite are strings."""
    if type(value) is float:
        return value
    if type(value) is int or value in ("nan", "inf", "-inf"):
        try:
            return float(value)
        except OverflowError:  # an integer of more than 308 digits
            return None
    return None


def _finite(value: Any) -> float | None:
    """Read a time or a duration: nothing is done at infinity."""
    read = number(value)
    return read if read is not None and abs(read) < 1e12 else None


def _whole(value: Any) -> int | None:
    # type, not isinstance: True is not a step
    return value if type(value) is int and 0 <= value < 2**53 else None


def _text(value: Any) -> str:
    # Long enough for any message, and yet a page of many stays small.
    return value[:_MOST_CHARACTERS] if isinstance(value, str) else ""


def _origin(event: dict[str, Any]) -> str:
    world_size = _whole(event.get("world_size"))
    return "" if world_size is None else f"on {world_size} worker{'' if world_size == 1 else 's'}"


def _layers(value: Any) -> Layers:
    layers = value if isinstance(value, dict) else {}
    return {
        name: {key: read for key, each in statistics.items() if (read := number(each)) is not None}
        for name, statistics in layers.items()
        if isinstance(statistics, dict)
    }
