"""Figures of a diagnosis: values by layer, the loss along the gradient, the loss around weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, PercentFormatter

from syncnorm.train.report.svg import WIDTH, run_colour, to_svg
from syncnorm.train.report.text import plain, shorten

_MOST_ROWS, _MARKERS = 64, "osD^"
# Above this the colours of a surface would show nothing but its edge.
_LOG_RATIO = 20.0
Values = Sequence[float | None]


def by_layer(
    key: str,
    title: str,
    layers: Sequence[str],
    series: Mapping[str, Values],
    *,
    log: bool = False,
    share: bool = False,
) -> Markup | None:
    """Draw a row for each layer, the first one at the top, and a dot for each value; None for none."""
    layers = layers[:_MOST_ROWS]
    known = [v for values in series.values() for v in values[:_MOST_ROWS] if v is not None]
    if not known:
        return None
    log = log and any(value > 0 for value in known)
    rows = len(layers)
    figure = Figure(figsize=(WIDTH, 0.75 + 0.17 * max(rows, 4)), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, values) in enumerate(series.items()):
        dots = [
            (value, row)
            for row, value in enumerate(values[:_MOST_ROWS])
            if value is not None and (value > 0 or not log)
        ]
        axes.plot(
            [value for value, _ in dots],
            [row for _, row in dots],
            linestyle="",
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=3.4,
            color=run_colour(index),
            label=name,
        )
    if log:
        axes.set_xscale("log")
        positive = [value for value in known if value > 0]
        # A short axis with powers of ten alone would have one label, or none.
        subs = (1.0,) if max(positive) > 100 * min(positive) else (1.0, 2.0, 5.0)
        axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=9))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    else:
        low = min(0.0, *known) if len(known) > 1 else min(0.0, known[0])
        high = max(0.0, *known) if len(known) > 1 else max(0.0, known[0])
        axes.set_xlim(low - 0.03 * (high - low or 1), high + 0.06 * (high - low or 1))
        axes.xaxis.set_major_locator(MaxNLocator(5))
    if share:
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    _rows(axes, layers)
    if len(series) > 1:
        count = len(series)
        figure.legend(
            loc="outside upper left", ncols=count, frameon=False, fontsize=8, handlelength=1
        )
    return to_svg(figure, key, f"{title}: a row for each of {rows} layers.")


def _rows(axes: Axes, layers: Sequence[str]) -> None:
    axes.grid(True, axis="both")
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_yticks(range(len(layers)), [shorten(plain(name), 22) for name in layers], fontsize=8)


def along_gradient(found: Mapping[str, Any]) -> Markup | None:
    """Draw the loss by the length of the step, in learning rates."""
    points = list(zip([0.0, *found["steps"]], [found["loss"], *found["losses"]], strict=True))
    known = [(step, loss) for step, loss in points if loss is not None]
    if len(known) < 2:
        return None
    figure = Figure(figsize=(WIDTH, 2.4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*known, strict=True), color=run_colour(0), marker="o", markersize=3)
    axes.set_xlabel("step along the gradient, in learning rates", loc="right")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    text = ", ".join(f"{loss:.4g} at {step:g}" for step, loss in known)
    return to_svg(figure, "along-gradient", f"The loss along the gradient: {text}.")


def surfaces(found: Mapping[str, Any]) -> dict[str, Markup]:
    """Draw the loss over the plane in each mode, in colours that mean the same in all."""
    grids = {
        mode: np.array([[math.nan if v is None else v for v in row] for row in rows])
        for mode, rows in found["modes"].items()
    }
    finite = np.concatenate([each[np.isfinite(each)] for each in grids.values()])
    if not len(finite):
        return {}
    low, high = float(finite.min()), float(finite.max())
    is_log = low > 0 and high > _LOG_RATIO * low
    if is_log:
        grids = {mode: np.log10(each) for mode, each in grids.items()}
        low, high = math.log10(low), math.log10(high)
    high = high if high > low else low + 1
    return {
        mode: _surface(mode, each, found["axis"], low, high, is_log=is_log)
        for mode, each in grids.items()
    }


def _surface(
    mode: str, grid: Any, axis: Sequence[float], low: float, high: float, *, is_log: bool
) -> Markup:
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.add_subplot()
    half = (axis[-1] - axis[0]) / max(1, len(axis) - 1) / 2
    edge = (axis[0] - half, axis[-1] + half)
    image = axes.imshow(
        grid.T,
        cmap="viridis",
        vmin=low,
        vmax=high,
        origin="lower",
        interpolation="none",
        extent=(*edge, *edge),
        aspect="auto",
    )
    axes.plot([0], [0], marker="+", color="white", markersize=9)
    axes.grid(False)
    axes.set_xlabel("along the first direction", loc="right")
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=18)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.grid(False)
    bar.locator = MaxNLocator(5)
    if is_log:
        bar.formatter = FuncFormatter(lambda value, _: f"{10**value:.3g}")
    bar.update_ticks()
    return to_svg(figure, f"surface-{mode}", f"The loss around the weights, mode {mode}.")
