"""Values of a figure's curves that a browser shows under the pointer, without a script.

Strips that cannot be seen lie over the axes, one for each of a number of steps; the title of each
has that step and the value of every run there.
"""

import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes

from syncnorm.train.report.series import Array

_MOST_STRIPS = 60
# Figures of SVG have 72 units to an inch.
_UNITS = 72


def hover_strips(
    axes: Axes,
    series: Sequence[tuple[Array, Array]],
    names: Sequence[str],
    write: Callable[[float], str],
) -> ET.Element:
    """Make the strips over finished axes.

    Args:
        axes: with their limits set.
        series: steps and values of each run.
        names: of the runs.
        write: formats a value.
    """
    group = ET.Element("g", {"class": "hover"})
    steps = _steps(series)
    left, right = axes.get_xlim()
    edges = np.concatenate([[left], (steps[1:] + steps[:-1]) / 2, [right]])  # (strips + 1,)
    figure = axes.get_figure(root=True)
    assert figure is not None
    scale = _UNITS / figure.dpi
    box = axes.get_window_extent()
    x = axes.transData.transform(np.stack([edges, np.zeros_like(edges)], axis=1))[:, 0] * scale
    top = figure.get_figheight() * _UNITS - box.y1 * scale
    for index, step in enumerate(steps):
        lines = [
            f"{name}: {write(value)}"
            for name, each in zip(names, series, strict=True)
            if (value := _value(each, step, edges[index], edges[index + 1])) is not None
        ]
        rect = ET.SubElement(
            group,
            "rect",
            {
                "x": f"{x[index]:.1f}",
                "y": f"{top:.1f}",
                "width": f"{x[index + 1] - x[index]:.1f}",
                "height": f"{box.height * scale:.1f}",
            },
        )
        ET.SubElement(rect, "title").text = "\n".join([f"step {step:,.0f}", *lines])
    return group


def _steps(series: Sequence[tuple[Array, Array]]) -> Array:
    """Choose steps on record, evenly among those of all runs."""
    steps = np.unique(np.concatenate([x for x, _ in series]))
    if len(steps) <= _MOST_STRIPS:
        return steps
    return steps[np.linspace(0, len(steps) - 1, _MOST_STRIPS).round().astype(int)]


def _value(each: tuple[Array, Array], step: float, low: float, high: float) -> float | None:
    """The value on record nearest to a step, if one lies in the strip."""
    x, y = each
    known = np.flatnonzero((x >= low) & (x <= high) & np.isfinite(y))
    if not len(known):
        return None
    return float(y[known[np.abs(x[known] - step).argmin()]])
