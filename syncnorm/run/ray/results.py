"""The results of a sweep: a record of each trial, the best one, a table, files, a page."""

import csv
import io
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from syncnorm.errors import CheckpointError, ConfigError
from syncnorm.run.ending import Exit, read_exit
from syncnorm.run.ray.sweep import Sweep, write_record
from syncnorm.run.resume import allow_options
from syncnorm.train.checkpoint.store import CHECKPOINTS, CheckpointStore
from syncnorm.train.files import write_text_whole
from syncnorm.train.metrics import last_step, read_events
from syncnorm.train.report import write_report
from syncnorm.train.task.measures import format_value

TABLE, PAGE = "sweep.csv", "report.html"
_VALIDATION = "validation"
_EARLY = "ended early: others were better"


@dataclass(frozen=True)
class TrialResult:
    """End of a trial, as far as it has got.

    Args:
        trial: name of the trial and of its folder.
        values: by key, what it has instead of the others.
        status: done, early (it fell behind), stopped, failed or unfinished.
        reason: of its end.
        step: optimizer steps on record.
        best: the deciding metric on the validation set, of the best evaluation; None without one.
        metrics: the last ones, by split.
    """

    trial: str
    values: dict[str, Any]
    status: str
    reason: str
    step: int
    best: float | None
    metrics: dict[str, dict[str, float]]


def read_results(sweep: Sweep, metric: str) -> list[TrialResult]:
    """Read what is on record about each trial.

    Args:
        sweep: whose trials they are.
        metric: that decides; with a leading - the lowest is best.
    """
    return [
        _read_result(Path(sweep.folder) / name, values, metric)
        for name, values in zip(sweep.names(), sweep.trials, strict=True)
    ]


def best_of(results: Sequence[TrialResult], metric: str) -> TrialResult | None:
    """Return the best of the trials that were validated; the first of equals."""
    sign = -1 if metric.startswith("-") else 1
    judged = [each for each in results if each.best is not None and each.status != "failed"]
    return max(judged, key=lambda each: sign * (each.best or 0.0), default=None)


def validations(folder: Path, metric: str) -> list[float]:
    """Return the deciding metric of each evaluation on the validation set, in their order."""
    name = f"{_VALIDATION}_{metric.removeprefix('-')}"
    events, _ = read_events(folder / "metrics.jsonl")
    by_step = {
        event.get("step"): float(event[name])
        for event in events
        if event["event"] in ("epoch", "evaluation") and name in event
    }
    return list(by_step.values())


def note_early_end(folder: Path) -> None:
    """Record that a trial fell behind, so that it does not go on later; one that is done stays so."""
    end = read_exit(folder)
    if end is not None and end.status == "done":
        return
    step = last_step(folder / "metrics.jsonl")
    Exit("stopped", _EARLY, step, 0).write(folder)


def is_over(folder: Path) -> bool:
    """Return True for a trial that has nothing left to do."""
    end = read_exit(folder)
    return end is not None and end.exit_code == 0


def write_results(sweep: Sweep, results: Sequence[TrialResult], metric: str) -> list[str]:
    """Write the record, the table and the page, and describe the result for the user.

    Returns:
        Lines: the table, the best trial and its folder, the page; last the sweep's folder.
    """
    folder = Path(sweep.folder)
    best = best_of(results, metric)
    write_record(sweep, [asdict(each) for each in results], None if best is None else best.trial)
    header, rows = _rows(sweep, results, metric)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text_whole(folder / TABLE, text.getvalue())
    lines = [*_aligned([header, *rows]), *_describe_best(sweep, results, best, metric)]
    lines += [f"{each.trial}: {each.reason}" for each in results if each.status == "failed"]
    begun = [
        folder / each.trial for each in results if (folder / each.trial / "metrics.jsonl").exists()
    ]
    if begun:
        try:
            lines.append(f"compare them: {write_report(begun, folder / PAGE)}")
        except ConfigError as error:
            lines.append(str(error))
    return [*lines, str(folder)]


def exit_code(results: Sequence[TrialResult]) -> int:
    """Return the exit status: 0 all done, 1 some failed, 75 some are to go on."""
    statuses = {each.status for each in results}
    if "failed" in statuses:
        return 1
    return 0 if statuses <= {"done", "early"} else 75


def _read_result(folder: Path, values: dict[str, Any], metric: str) -> TrialResult:
    end = read_exit(folder)
    status, reason = ("unfinished", "") if end is None else (end.status, end.reason)
    if end is not None and status == "stopped" and end.exit_code == 0:
        status = "early"
    found = [value for value in validations(folder, metric) if not math.isnan(value)]
    choose = min if metric.startswith("-") else max
    return TrialResult(
        folder.name,
        values,
        status,
        reason,
        last_step(folder / "metrics.jsonl"),
        choose(found, default=None),
        {} if end is None else end.metrics,
    )


def _rows(
    sweep: Sweep, results: Sequence[TrialResult], metric: str
) -> tuple[list[str], list[list[str]]]:
    name = metric.removeprefix("-")
    header = ["trial", *sweep.keys, "status", "step", f"best {_VALIDATION} {name}", f"test {name}"]
    rows = []
    for each in results:
        test = each.metrics.get("test", {}).get(name)
        figures = ["" if one is None else format_value(name, one) for one in (each.best, test)]
        varied = [str(value) for value in each.values.values()]
        number = each.trial.split("-")[1]
        rows.append([number, *varied, each.status, str(each.step), *figures])
    shown = [any(row[place] for row in rows) for place in range(len(header))]
    header, *rows = ([cell for cell, is_so in zip(row, shown) if is_so] for row in [header, *rows])
    return header, rows


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _describe_best(
    sweep: Sweep, results: Sequence[TrialResult], best: TrialResult | None, metric: str
) -> list[str]:
    if all(each.status == "failed" for each in results):
        return ["no best trial: all have failed"]
    if best is None or best.best is None:
        return [
            "no best trial: there is no validation set, and a test set is not chosen by; "
            "data.validation=0.1 sets a tenth of the training set apart"
        ]
    name = metric.removeprefix("-")
    value = format_value(name, best.best)
    run = Path(sweep.folder) / best.trial
    options = allow_options(sweep.allowed)
    try:
        weights = CheckpointStore(run / CHECKPOINTS).best()
    except CheckpointError:
        weights = None
    if weights is not None:  # the newest may be of a later evaluation, and worse
        options += ["--checkpoint", "best"]
    command = shlex.join(["syncnorm", "predict", str(run), "FILES", *options])
    return [
        f"best trial: {best.trial}, {_VALIDATION} {name.replace('_', ' ')} {value}",
        f"to use it: {command}; to begin another run with its weights: "
        f"model.weights={weights or run}",
    ]
