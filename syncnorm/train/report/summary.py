"""Summaries of runs, and the differences of their configurations."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from syncnorm.train.report.run import Run


@dataclass(frozen=True)
class Summary:
    """Figures of a run; None where nothing is on record.

    Args:
        steps: optimizer steps at the end of the record.
        workers: number of workers, of each attempt where it changed.
        best_accuracy: highest on the test set, 0 to 1.
        best_step: first step with it.
        last_accuracy: at the last step that has one.
        samples_per_second: median over the intervals.
        exchange_share: median over the intervals, 0 to 1.
        faults: number of each kind.
        restarts: starts of the run after its first.
        seconds: of work.
    """

    steps: int
    workers: list[int]
    best_accuracy: float | None
    best_step: int | None
    last_accuracy: float | None
    samples_per_second: float | None
    exchange_share: float | None
    faults: Counter[str]
    restarts: int
    seconds: float | None


def summarize(run: Run) -> Summary:
    """Compute the figures of a run."""
    events = run.events
    accuracy = _finite(events.curve("test_accuracy"))
    best_step = max(sorted(accuracy), key=lambda step: accuracy[step], default=None)
    return Summary(
        steps=events.last_step,
        workers=_changes(
            [
                start["world_size"]
                for start in events.starts
                if isinstance(start.get("world_size"), int)
            ]
        ),
        best_accuracy=None if best_step is None else accuracy[best_step],
        best_step=best_step,
        last_accuracy=accuracy[max(accuracy)] if accuracy else None,
        samples_per_second=_median(events.curve("samples_per_second")),
        exchange_share=_median(events.curve("exchange_share")),
        faults=Counter(mark.detail for mark in events.marks if mark.kind == "fault"),
        restarts=sum(mark.kind == "restart" for mark in events.marks),
        seconds=events.seconds,
    )


def not_finite_steps(run: Run) -> list[int]:
    """Return the steps whose loss is not a finite number."""
    return sorted(
        step for step, loss in run.events.curve("loss").items() if not math.isfinite(loss)
    )


def config_differences(runs: Sequence[Run]) -> dict[str, list[str | None]]:
    """Return the dotted keys whose values differ, with each run's value; None where it has none."""
    flat = [_flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for each in flat for key in each)
    rows = {key: [each.get(key) for each in flat] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = (
                value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            )
    return flat


def _finite(values: dict[int, float]) -> dict[int, float]:
    return {step: value for step, value in values.items() if math.isfinite(value)}


def _median(values: dict[int, float]) -> float | None:
    finite = _finite(values)
    return statistics.median(finite.values()) if finite else None


def _changes(values: list[int]) -> list[int]:
    return [value for index, value in enumerate(values) if index == 0 or value != values[index - 1]]
