"""The page's tables."""

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from itertools import groupby

from syncnorm.train.report.events import Mark
from syncnorm.train.report.heatmaps import STATISTICS
from syncnorm.train.report.marks import SIGNS
from syncnorm.train.report.markup import element
from syncnorm.train.report.run import Run
from syncnorm.train.report.summary import Summary
from syncnorm.train.report.svg import RUN_COLOURS, run_dashes
from syncnorm.train.report.text import ABSENT, clock, duration, percent, rate

_MOST_ROWS = 200
_DASHES = {"solid": "none", "dashed": "5 2", "dotted": "1.5 1.5", "dashdot": "5 2 1.5 2"}

Cell = ET.Element | str


def run_name(run: Run, index: int) -> ET.Element:
    """A run's name with a piece of its line."""
    line = element(
        "line",
        x1="0",
        x2="20",
        y1="5",
        y2="5",
        stroke_width="3",
        stroke_dasharray=_DASHES[run_dashes(index)],
    )
    colour = f"stroke: var(--run-{index % RUN_COLOURS})"
    swatch = element(
        "svg", line, viewBox="0 0 20 10", class_="swatch", aria_hidden="true", style=colour
    )
    return element("span", swatch, element("span", run.name), class_="run")


def summary_table(runs: Sequence[Run], summaries: Sequence[Summary]) -> ET.Element:
    """A row for each run."""
    headings = (
        "Run", "Status", "Steps", "Workers", "Best test accuracy", "Last test accuracy", "Samples/s",
        "In exchanges", "Faults", "Restarts", "Duration",
    )  # fmt: skip
    best = max(
        (each.best_accuracy for each in summaries if each.best_accuracy is not None), default=None
    )
    rows = []
    for index, (run, each) in enumerate(zip(runs, summaries, strict=True)):
        is_best = len(runs) > 1 and best is not None and each.best_accuracy == best
        rows.append([
            run_name(run, index),
            _status(run),
            f"{each.steps:,}",
            " → ".join(f"{workers:,}" for workers in each.workers) or ABSENT,
            _with_note(percent(each.best_accuracy), f"step {each.best_step:,}" if each.best_step else "", is_best),
            percent(each.last_accuracy),
            rate(each.samples_per_second),
            percent(each.exchange_share),
            _with_note(f"{each.faults.total():,}", _kinds(each)),
            f"{each.restarts:,}",
            duration(each.seconds),
        ])  # fmt: skip
    return table(headings, rows, "summary", numbers=range(2, 11))


def table(
    headings: Sequence[str], rows: Iterable[Sequence[Cell]], class_: str, numbers: Sequence[int]
) -> ET.Element:
    """A table whose rows become cards on a narrow screen.

    Args:
        headings: one for each column.
        rows: cells in the same order.
        class_: for the style.
        numbers: the columns to align at the right.
    """
    # The roles are said again because a style that displays cells as blocks takes them away.
    kinds = ["number" if index in numbers else "words" for index in range(len(headings))]
    head = element(
        "tr",
        *(element("th", each, scope="col", class_=kind) for each, kind in zip(headings, kinds)),
        role="row",
    )
    body = [
        element("tr", *(
            element("td", cell, class_=kind, data_label=heading, role="cell")
            for cell, kind, heading in zip(row, kinds, headings, strict=True)
        ), role="row")
        for row in rows
    ]  # fmt: skip
    return element(
        "table",
        element("thead", head, role="rowgroup"),
        element("tbody", *body, role="rowgroup"),
        class_=class_,
        role="table",
    )


def differences_table(runs: Sequence[Run], differences: dict[str, list[str | None]]) -> ET.Element:
    """A row for each key, a column for each run."""
    names = (element("th", run_name(run, index), scope="col") for index, run in enumerate(runs))
    head = element("tr", element("th", "Key", scope="col"), *names)
    body = (
        element(
            "tr",
            element("th", element("code", key), scope="row"),
            *(_value(value) for value in values),
        )
        for key, values in differences.items()
    )
    return _scrolling(
        element("table", element("thead", head), element("tbody", *body)), "Differences"
    )


def _value(value: str | None) -> ET.Element:
    return element(
        "td",
        element("span", "not there", class_="quiet") if value is None else element("code", value),
    )


def _scrolling(inner: ET.Element, label: str) -> ET.Element:
    # A region that can be scrolled must be reachable without a mouse.
    return element("div", inner, class_="scroll", tabindex="0", role="region", aria_label=label)


def _status(run: Run) -> ET.Element:
    status = run.status or "unfinished"
    kind = status if status in ("done", "failed", "stopped") else "unfinished"
    return element("span", status, class_=f"badge {kind}")


def _with_note(main: Cell, note: str, is_best: bool = False) -> ET.Element:
    small = element("small", note) if note else None
    return element("span", element("strong", main) if is_best else main, small, class_="noted")


def _kinds(each: Summary) -> str:
    return ", ".join(
        f"{count:,} {kind.replace('_', ' ')}" for kind, count in each.faults.most_common(5)
    )


def marks_table(runs: Sequence[Run]) -> ET.Element | None:
    """What happened in the runs, checkpoints in a row gathered; None if nothing did."""
    rows = [
        [run_name(run, index), *cells]
        for index, run in enumerate(runs)
        for cells in _shortened(_mark_rows(run.events.marks))
    ]
    return (
        table(("Run", "Time", "Step", "What", "Message"), rows, "marks", numbers=(1, 2))
        if rows
        else None
    )


def _mark_rows(marks: Sequence[Mark]) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for is_checkpoint, group in groupby(marks, lambda mark: mark.kind == "checkpoint"):
        members = list(group)
        if is_checkpoint:
            first, last = members[0], members[-1]
            steps = f"{first.step:,}" if len(members) == 1 else f"{first.step:,} to {last.step:,}"
            word = "checkpoint" if len(members) == 1 else f"{len(members):,} checkpoints"
            rows.append(
                [
                    clock(last.seconds),
                    steps,
                    _what("checkpoint", word),
                    f"newest: {last.detail or ABSENT}",
                ]
            )
        else:
            rows += [[clock(mark.seconds), f"{mark.step:,}", *_said(mark)] for mark in members]
    return rows


def _said(mark: Mark) -> tuple[Cell, Cell]:
    if mark.kind == "fault":
        return _what("fault", f"fault: {mark.detail.replace('_', ' ')}"), mark.message
    origin = f"from {mark.detail}" if mark.detail else "from the beginning"
    return _what("restart", "restart"), f"{origin} {mark.message}".rstrip()


def _what(kind: str, word: str) -> ET.Element:
    return element(
        "span",
        element("span", SIGNS[kind][1], aria_hidden="true", class_="sign"),
        " ",
        word,
        class_=kind,
    )


def _shortened(rows: list[list[Cell]]) -> list[list[Cell]]:
    left_out = len(rows) - _MOST_ROWS
    if left_out <= 0:
        return rows
    half = _MOST_ROWS // 2
    return [*rows[:half], ["", "", "", f"{left_out:,} more are left out here"], *rows[-half:]]


def layers_table(run: Run) -> ET.Element | None:
    """Each layer's statistics at the last record; None without one."""
    if not run.events.layers:
        return None
    record = run.events.layers[max(run.events.layers)]
    known = [each for each in STATISTICS if any(each.name in values for values in record.values())]
    rows = [
        [element("code", name), *(_number(values.get(each.name), each.share) for each in known)]
        for name, values in list(record.items())[:_MOST_ROWS]
    ]
    headings = ["Layer", *(each.title for each in known)]
    return _scrolling(
        table(headings, rows, "plain", numbers=range(1, len(headings))), f"Layers of {run.name}"
    )


def _number(value: float | None, share: bool) -> str:
    return percent(value) if share or value is None else f"{value:#.4g}"
