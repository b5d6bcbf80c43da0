"""The page from its parts."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from importlib.resources import files

from syncnorm import __version__
from syncnorm.train.report.curves import CURVES, curve_figure
from syncnorm.train.report.heatmaps import STATISTICS, Statistic, heat_figures
from syncnorm.train.report.marks import SIGNS
from syncnorm.train.report.markup import document, element
from syncnorm.train.report.run import Run
from syncnorm.train.report.summary import config_differences, not_finite_steps, summarize
from syncnorm.train.report.svg import figure_style
from syncnorm.train.report.tables import (
    differences_table,
    layers_table,
    marks_table,
    run_name,
    summary_table,
)

# Nothing is fetched and no script runs, whatever a run's folder holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render_page(runs: Sequence[Run]) -> str:
    """Write the page as HTML."""
    with figure_style():
        parts = [
            _header(runs),
            _summary(runs),
            _config(runs),
            _curves(runs),
            _layers(runs),
            _marks(runs),
            _machine(runs),
        ]
    footer = element(
        "footer",
        f"Written by syncnorm {__version__}. The page is complete in itself: it loads nothing.",
    )
    return document(_head(runs), element("body", element("main", *parts), footer))


def _head(runs: Sequence[Run]) -> ET.Element:
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"syncnorm report: {', '.join(run.name for run in runs)}"),
        element(
            "style", files("syncnorm.train.report").joinpath("page.css").read_text(encoding="utf-8")
        ),
    )


def _header(runs: Sequence[Run]) -> ET.Element:
    heading = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    return element(
        "header", element("p", "syncnorm report", class_="kicker"), element("h1", heading)
    )


def _section(key: str, title: str, *children: ET.Element | str | None) -> ET.Element:
    return element(
        "section",
        element("h2", title, id=f"h-{key}"),
        *children,
        id=key,
        aria_labelledby=f"h-{key}",
    )


def _summary(runs: Sequence[Run]) -> ET.Element:
    notes = [
        element("li", run_name(run, index), " ", note)
        for index, run in enumerate(runs)
        for note in _notes(run)
    ]
    listed = element("ul", *notes, class_="notes") if notes else None
    return _section(
        "summary", "Summary", summary_table(runs, [summarize(run) for run in runs]), listed
    )


def _notes(run: Run) -> list[str]:
    notes = []
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


def _config(runs: Sequence[Run]) -> ET.Element:
    whole = _fold(
        "The whole configuration",
        runs,
        [element("pre", run.config_text, tabindex="0") for run in runs],
    )
    if len(runs) == 1:
        return _section("config", "Configuration", whole)
    differences = config_differences(runs)
    found = (
        differences_table(runs, differences)
        if differences
        else element("p", "The configurations are the same.")
    )
    return _section("config", "What differs in the configurations", found, whole)


def _fold(title: str, runs: Sequence[Run], parts: Sequence[ET.Element | None]) -> ET.Element | None:
    """Something of each run that has it, folded away; None if no run has."""
    known = [(index, part) for index, part in enumerate(parts) if part is not None]
    if not known:
        return None
    named = (
        each
        for index, part in known
        for each in (element("h3", run_name(runs[index], index)), part)
    )
    inside = named if len(runs) > 1 else [part for _, part in known]
    return element("details", element("summary", title), *inside)


def _curves(runs: Sequence[Run]) -> ET.Element:
    drawn = [(curve, curve_figure(curve, runs)) for curve in CURVES]
    cards = [
        _card(curve.title, curve.note, figure) for curve, figure in drawn if figure is not None
    ]
    if not cards:
        return _section("curves", "Curves", element("p", "No step is on record yet."))
    missing = ", ".join(curve.title.lower() for curve, figure in drawn if figure is None)
    absent = element("p", f"Not on record: {missing}.", class_="quiet") if missing else None
    return _section(
        "curves", "Curves", _legend(runs), element("div", *cards, class_="cards"), absent
    )


def _legend(runs: Sequence[Run]) -> ET.Element:
    names = (
        [element("li", run_name(run, index)) for index, run in enumerate(runs)]
        if len(runs) > 1
        else []
    )
    seen = {mark.kind for run in runs for mark in run.events.marks}
    signs = [
        element("li", element("span", sign, class_="sign"), f" {kind}", class_="kind")
        for kind, (_, sign) in SIGNS.items()
        if kind in seen
    ]
    return element("ul", *names, *signs, class_="legend", aria_label="Legend")


def _card(title: ET.Element | str, note: str | None, figure: ET.Element) -> ET.Element:
    caption = element("figcaption", element("h3", title), element("p", note) if note else None)
    return element("figure", caption, figure, class_="card")


def _layers(runs: Sequence[Run]) -> ET.Element | None:
    maps = [
        (statistic, figures)
        for statistic in STATISTICS
        if (figures := heat_figures(statistic, runs))
    ]
    if not maps:
        return None
    note = "Each row is a layer, from the first to the last."
    if len(runs) == 1:
        cards = [
            _card(statistic.title, statistic.note, figure)
            for statistic, figures in maps
            for _, figure in figures
        ]
        parts = [element("div", *cards, class_="cards")]
    else:
        note += " The colours of a quantity mean the same for all runs."
        parts = [_layers_fold(statistic, figures, runs) for statistic, figures in maps]
    tables = _fold("Numbers at the last record", runs, [layers_table(run) for run in runs])
    return _section(
        "layers", "Normalisation layers", element("p", note, class_="quiet"), *parts, tables
    )


def _layers_fold(
    statistic: Statistic, figures: Sequence[tuple[int, ET.Element]], runs: Sequence[Run]
) -> ET.Element:
    cards = [_card(run_name(runs[index], index), None, figure) for index, figure in figures]
    note = element("p", statistic.note, class_="quiet")
    return element(
        "details",
        element("summary", statistic.title),
        note,
        element("div", *cards, class_="cards"),
        open="",
    )


def _marks(runs: Sequence[Run]) -> ET.Element | None:
    found = marks_table(runs)
    return None if found is None else _section("marks", "Faults, restarts and checkpoints", found)


def _machine(runs: Sequence[Run]) -> ET.Element | None:
    starts = [_start(run.events.starts[-1]) if run.events.starts else None for run in runs]
    fold = _fold("Devices, versions and placement", runs, starts)
    return None if fold is None else _section("machine", "Where it ran", fold)


def _start(start: dict[str, object]) -> ET.Element:
    versions = start.get("versions")
    rows = [
        (name.replace("_", " "), start[name])
        for name in ("device", "world_size", "parameters")
        if name in start
    ]
    rows += list(versions.items()) if isinstance(versions, dict) else []
    listed = [
        each
        for name, value in rows
        for each in (element("dt", str(name)), element("dd", _shown(value)))
    ]
    placement = start.get("placement")
    return element(
        "div",
        element("dl", *listed),
        element("pre", placement, tabindex="0") if isinstance(placement, str) else None,
    )


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
