"""The table and the page of `benchmarks.regimes`."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.study import spread

if TYPE_CHECKING:
    from benchmarks.regimes import Cells, Plan

# An accuracy for a run whose loss was not finite: that of a guess among ten classes.
GUESS = 0.1
_ROW, _WIDTH, _ABREAST = 0.24, 1.75, 5
"""Inches of a row and of a panel in a figure, and panels side by side."""


def write(out: Path, cells: Cells, plan: Plan, rates: dict[str, float]) -> str:
    """Write `table.md` and `page.html` into a folder; return the text of the former."""
    about = describe(plan, rates)
    lines = [about]
    for network, rows in cells.items():
        lines += ["", f"{network.replace('_', ' ').capitalize()} network:", "", *table(rows)]
    text = "\n".join(lines)
    (out / "table.md").write_text(text + "\n")
    (out / "page.html").write_text(page(about, cells))
    return text


def describe(plan: Plan, rates: dict[str, float]) -> str:
    """Describe in words what was trained."""
    chosen = ", ".join(f"{rate:g} ({network.replace('_', ' ')})" for network, rate in rates.items())
    return (
        f"Test accuracy in %, mean and half the range over seeds; n: seeds that all rows of the "
        f"column have. {plan.data}, {plan.samples} training samples, {plan.epochs} epochs of "
        f"steps of 64, SGD with momentum, cosine schedule with the lowest learning rate that is "
        f"within a point of the best for batch norm over the step: {chosen or 'not chosen yet'}. A "
        f"loss that is not finite counts as {100 * GUESS:.0f} %, with *. torch {torch.__version__}, one thread a worker."
    )


def table(rows: dict[str, dict[str, dict[int, float | None]]]) -> list[str]:
    """The lines of a table in Markdown; columns without a whole seed are left out."""
    seen = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    if not seen:
        return ["no column is complete yet"]
    numbers = [max(len(cells.get(column, ())) for cells in rows.values()) for column in seen]
    heads = [f"{column} (n {number})" for column, number in zip(seen, numbers)]
    lines = [f"| normalisation | {' | '.join(heads)} |", "|---" * (len(seen) + 1) + "|"]
    for row, cells in rows.items():
        if cells:
            texts = [cell(cells[column]) if column in cells else "" for column in seen]
            lines.append(f"| {row} | {' | '.join(texts)} |")
    return lines


def cell(accuracies: Mapping[int, float | None]) -> str:
    """Write mean and spread in %, with a star if a loss was not finite."""
    values = shown(accuracies)
    middle, half = spread(values)
    star = "*" if None in accuracies.values() else ""
    return f"{100 * middle:.1f}{star}" + (f" ±{100 * half:.1f}" if len(values) > 1 else "")


def shown(accuracies: Mapping[int, float | None]) -> dict[int, float]:
    """Accuracies, with that of a guess where there is none."""
    return {seed: GUESS if value is None else value for seed, value in accuracies.items()}


def page(about: str, cells: Cells) -> str:
    """One HTML page: a figure and a table for each network."""
    # Here, because only the page needs matplotlib.
    from syncnorm.train.report.svg import figure_style

    style = files("syncnorm.train.report").joinpath("page.css").read_text()
    parts = []
    for network, rows in cells.items():
        with figure_style():
            parts.append(
                f"<section><h2>{escape(network.replace('_', ' '))}</h2>"
                f'<figure class="card wide">{_figure(network, rows)}</figure>'
                f'<div class="scroll" tabindex="0">{_html(table(rows))}</div></section>'
            )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Normalisation by regime</title><style>{style}</style></head><body><main>"
        "<header><h1>Normalisation by what the workers see</h1><p>Test accuracy in %. Dots are "
        "seeds, bars their means; the dashed line is batch norm over the whole step.</p></header>"
        f"{''.join(parts)}<footer>{escape(about)}</footer></main></body></html>\n"
    )


def _html(lines: list[str]) -> str:
    """Convert a table of Markdown."""
    if len(lines) == 1:
        return escape(lines[0])
    rows = [line.strip("| ").split(" | ") for line in (lines[0], *lines[2:])]
    texts = []
    for tag, row in zip(["th"] + ["td"] * len(lines), rows):
        texts.append("".join(f"<{tag}>{escape(each)}</{tag}>" for each in row))
    return f"<table>{''.join(f'<tr>{text}</tr>' for text in texts)}</table>"


def _figure(network: str, rows: dict[str, dict[str, dict[int, float | None]]]) -> str:
    from matplotlib.figure import Figure

    from syncnorm.train.report.svg import MUTED, run_colour, to_svg

    names = [row for row, cells in rows.items() if cells]
    columns = list(dict.fromkeys(column for row in names for column in rows[row]))
    if not columns:
        return "no column is complete yet"
    high, wide = -(-len(columns) // _ABREAST), min(_ABREAST, len(columns))
    size = 1.8 + _WIDTH * wide, high * (0.6 + _ROW * len(names))
    figure = Figure(size, layout="constrained")
    panels = list(figure.subplots(high, wide, sharey=True, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    for axes, column in zip(panels, columns):
        axes.set_axis_on()
        for place, row in enumerate(names):
            if column not in rows[row]:
                continue
            values = [100 * value for value in shown(rows[row][column]).values()]
            middle, colour = sum(values) / len(values), run_colour(1 if place else 0)
            axes.barh(place, middle, color=colour, height=0.55, alpha=0.35)
            axes.plot(values, [place] * len(values), "o", color=colour, markersize=3)
            # Within the bar, unless a dot would cover it.
            left = 2 if min(values) > 25 else max(values) + 4
            axes.text(
                left, place, f"{middle:.1f}", color=MUTED, fontsize=8, verticalalignment="center"
            )
            if not place:
                axes.axvline(middle, color=MUTED, linewidth=0.8, linestyle="dashed")
        axes.set_title(column, fontsize=8.5, color=MUTED)
        axes.set_xlim(0, 104)
        axes.set_xticks([0, 50, 100])
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
    return str(to_svg(figure, network, f"Test accuracy by normalisation, {network} network"))
