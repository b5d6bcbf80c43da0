"""Summaries of runs, and the differences of their configurations."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from syncnorm.train.config.section import leaves
from syncnorm.train.report.run import Run


@dataclass(frozen=True)
class Summary:
    """Figures of a run; None where nothing is on record.

    Args:
        steps: optimizer steps at the end of the record.
        workers: number of workers, of each attempt where it changed.
        metric: name of the one that decides, such as `test_accuracy`.
        best: its best value.
        best_step: first step with it.
        last: its last value.
        is_lowest: True if the lowest value is the best.
        samples_per_second: median over the intervals.
        exchange_share: median over the intervals, 0 to 1.
        faults: number of each kind.
        restarts: starts of the run after its first.
        seconds: of work.
    """

    steps: int
    workers: list[int]
    metric: str | None
    best: float | None
    best_step: int | None
    last: float | None
    is_lowest: bool
    samples_per_second: float | None
    exchange_share: float | None
    faults: Counter[str]
    restarts: int
    seconds: float | None


def summarize(run: Run) -> Summary:
    """Compute the figures of a run."""
    events = run.events
    metric, sign = _deciding(run)
    values = _finite(events.curve(metric or ""))
    best_step = max(sorted(values), key=lambda step: sign * values[step], default=None)
    return Summary(
        steps=events.last_step,
        workers=_changes(
            [
                start["world_size"]
                for start in events.starts
                if isinstance(start.get("world_size"), int)
            ]
        ),
        metric=metric,
        best=None if best_step is None else values[best_step],
        best_step=best_step,
        last=values[max(values)] if values else None,
        is_lowest=sign < 0,
        samples_per_second=_median(events.curve("samples_per_second")),
        exchange_share=_median(events.curve("exchange_share")),
        faults=Counter(mark.detail for mark in events.marks if mark.kind == "fault"),
        restarts=sum(mark.kind == "restart" for mark in events.marks),
        seconds=events.seconds,
    )


def _deciding(run: Run) -> tuple[str | None, int]:
    """Find the metric that decides, None if none does, and the sign by which higher is better."""
    decides = next((start.get("decides") for start in reversed(run.events.starts)), None)
    name = decides if isinstance(decides, str) else "accuracy"
    wanted = (m for m in run.events.metrics if m.partition("_")[2] == name.removeprefix("-"))
    return next(wanted, None), -1 if name[:1] == "-" else 1


def not_finite_steps(run: Run) -> list[int]:
    """Return the steps whose loss is not a finite number."""
    return sorted(
        step for step, loss in run.events.curve("loss").items() if not math.isfinite(loss)
    )


def config_differences(runs: Sequence[Run]) -> dict[str, list[str | None]]:
    """Return the dotted keys whose values differ, with each run's value; None where it has none."""
    flat = [
        {".".join(map(str, key)): _text(value) for key, value in leaves(run.config)} for run in runs
    ]
    keys = dict.fromkeys(key for each in flat for key in each)
    rows = {key: [each.get(key) for each in flat] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _finite(values: dict[int, float]) -> dict[int, float]:
    return {step: value for step, value in values.items() if math.isfinite(value)}


def _median(values: dict[int, float]) -> float | None:
    finite = _finite(values)
    return statistics.median(finite.values()) if finite else None


def _changes(values: list[int]) -> list[int]:
    return [value for index, value in enumerate(values) if index == 0 or value != values[index - 1]]
