"""The page: data of the runs for the template page.html."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from syncnorm import __version__
from syncnorm.train.report.curves import all_curves, curve_figure, single_metrics
from syncnorm.train.report.events import Layers, Mark
from syncnorm.train.report.heatmaps import STATISTICS, heat_figures
from syncnorm.train.report.marks import SIGNS
from syncnorm.train.report.run import Run
from syncnorm.train.report.summary import Summary, config_differences, not_finite_steps, summarize
from syncnorm.train.report.svg import RUN_COLOURS, figure_style, run_dashes
from syncnorm.train.report.text import ABSENT, clock, duration, grouped, percent, plain, rate
from syncnorm.train.task.measures import format_metric, format_value

_MOST_ROWS = 200
_DASHES = {"solid": "none", "dashed": "5 2", "dotted": "1.5 1.5", "dashdot": "5 2 1.5 2"}


def render_page(runs: Sequence[Run], refresh_seconds: int | None) -> str:
    """Render the page as HTML."""
    with figure_style():
        curves = [(curve, curve_figure(curve, runs)) for curve in all_curves(runs)]
        maps = [(statistic, heat_figures(statistic, runs)) for statistic in STATISTICS]
    summaries = [summarize(run) for run in runs]
    page = template("page.html").render(
        runs=runs,
        refresh_seconds=refresh_seconds,
        summaries=summaries,
        best=_best(summaries),
        metric=_common_metric(summaries),
        notes=[(index, note) for index, run in enumerate(runs) for note in _notes(run)],
        differences=config_differences(runs),
        curves=[(curve, figure) for curve, figure in curves if figure is not None],
        absent_curves=[curve for curve, figure in curves if figure is None],
        kinds=[
            k for k in SIGNS if any(mark.kind == k for run in runs for mark in run.events.marks)
        ],
        maps=[(statistic, figures) for statistic, figures in maps if figures],
        layers={
            index: _layer_table(run.events.layers[max(run.events.layers)])
            for index, run in enumerate(runs)
            if run.events.layers
        },
        predictions={
            index: run.events.predictions
            for index, run in enumerate(runs)
            if run.events.predictions is not None
        },
        marks=[
            (index, row)
            for index, run in enumerate(runs)
            for row in _shorten(_mark_rows(run.events.marks))
        ],
        machines={
            index: _machine(run.events.starts[-1])
            for index, run in enumerate(runs)
            if run.events.starts
        },
    )
    return plain(page) + "\n"


def _read(name: str) -> str:
    return files("syncnorm.train.report").joinpath(name).read_text(encoding="utf-8")


def template(name: str) -> Template:
    """Make a template of a file beside this one, which escapes all values."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "clock": clock, "duration": duration, "grouped": grouped, "percent": percent, "rate": rate,
    }  # fmt: skip
    environment.globals |= {
        "absent": ABSENT,
        "colours": RUN_COLOURS,
        "dashes": lambda index: _DASHES[run_dashes(index)],
        "fault_kinds": _fault_kinds,
        "value": _value,
        "signs": {kind: sign for kind, (_, sign) in SIGNS.items()},
        "style": Markup(_read("page.css")),
        "version": __version__,
    }
    return environment.from_string(_read(name))


def _best(summaries: Sequence[Summary]) -> list[int]:
    """Return the indices of the runs with the best metric, if runs are compared by one."""
    values = [each.best for each in summaries if each.best is not None]
    if len(summaries) == 1 or not values or len({each.metric for each in summaries}) > 1:
        return []
    best = min(values) if summaries[0].is_lowest else max(values)
    return [i for i, each in enumerate(summaries) if each.best == best]


def _common_metric(summaries: Sequence[Summary]) -> str:
    """Name the metric that decides in all runs; "metric" where they differ."""
    names = {each.metric for each in summaries} - {None}
    return str(names.pop()).replace("_", " ") if len(names) == 1 else "metric"


def _value(each: Summary, value: float | None) -> str:
    return ABSENT if value is None else format_value(each.metric or "", value)


def _fault_kinds(each: Summary) -> str:
    return ", ".join(
        f"{count:,} {kind.replace('_', ' ')}" for kind, count in each.faults.most_common(5)
    )


def _notes(run: Run) -> list[str]:
    notes = []
    once = {name: run.events.curve(name) for name in single_metrics([run])}
    if once:
        values = [
            format_metric(name, value) for name, each in once.items() for value in each.values()
        ]
        notes.append(f"at its end: {', '.join(values)}")
    if run.status is None:
        notes.append("has no end on record: it is still running, or was killed")
    elif run.status != "done" and run.reason:
        notes.append(f"{run.status}: {run.reason}")
    steps = not_finite_steps(run)
    if steps:
        plural = "" if len(steps) == 1 else "s"
        notes.append(f"loss not finite at {len(steps):,} step{plural}, first at step {steps[0]:,}")
    if run.events.torn:
        plural = "" if run.events.torn == 1 else "s"
        notes.append(f"{run.events.torn:,} line{plural} of metrics.jsonl could not be read")
    return notes


@dataclass(frozen=True)
class _MarkRow:
    time: str = ""
    step: str = ""
    kind: str = ""
    text: str = ""
    message: str = ""


def _mark_rows(marks: Sequence[Mark]) -> list[_MarkRow]:
    """Make a row for each mark, and one for checkpoints in a row."""
    rows = []
    for is_checkpoint, group in groupby(marks, lambda mark: mark.kind == "checkpoint"):
        members = list(group)
        rows += [_checkpoints_row(members)] if is_checkpoint else map(_mark_row, members)
    return rows


def _checkpoints_row(marks: Sequence[Mark]) -> _MarkRow:
    first, last = marks[0], marks[-1]
    steps, text = f"{first.step:,}", "checkpoint"
    if len(marks) > 1:
        steps, text = f"{steps} to {last.step:,}", f"{len(marks):,} checkpoints"
    newest = f"newest: {last.detail or ABSENT}"
    return _MarkRow(clock(last.seconds), steps, "checkpoint", text, newest)


def _mark_row(mark: Mark) -> _MarkRow:
    time, step = clock(mark.seconds), f"{mark.step:,}"
    if mark.kind == "fault":
        text = f"fault: {mark.detail.replace('_', ' ')}"
        return _MarkRow(time, step, "fault", text, mark.message)
    origin = f"from {mark.detail}" if mark.detail else "from the beginning"
    return _MarkRow(time, step, "restart", "restart", f"{origin} {mark.message}".rstrip())


def _shorten(rows: list[_MarkRow]) -> list[_MarkRow]:
    left_out = len(rows) - _MOST_ROWS
    if left_out <= 0:
        return rows
    half = _MOST_ROWS // 2
    note = _MarkRow(message=f"{left_out:,} more are left out here")
    return [*rows[:half], note, *rows[-half:]]


def _layer_table(record: Layers) -> dict[str, Any]:
    """Return columns and rows of the layers' statistics."""
    known = [each for each in STATISTICS if any(each.name in values for values in record.values())]
    return {
        "columns": {"Layer": "words"} | {each.title: "number" for each in known},
        "rows": [
            (name, [_number(values.get(each.name), each.share) for each in known])
            for name, values in list(record.items())[:_MOST_ROWS]
        ],
    }


def _number(value: float | None, share: bool) -> str:
    return percent(value) if share or value is None else f"{value:#.4g}"


def _machine(start: dict[str, Any]) -> dict[str, Any]:
    """Return facts and placement from a run's `start` event."""
    versions, placement = start.get("versions"), start.get("placement")
    keys = [key for key in ("device", "world_size", "parameters") if key in start]
    facts = [(key.replace("_", " "), start[key]) for key in keys]
    facts += versions.items() if isinstance(versions, dict) else []
    return {
        "facts": [(name, f"{v:,}" if type(v) is int else str(v)) for name, v in facts],
        "placement": placement if isinstance(placement, str) else None,
    }
