"""Heat maps of layers' statistics, layer by step: one for each run, on one scale for all runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from syncnorm.train.report.curves import step_range
from syncnorm.train.report.run import Run
from syncnorm.train.report.series import LARGEST, Array
from syncnorm.train.report.svg import WIDTH, to_svg
from syncnorm.train.report.text import plain, shorten

_MOST_COLUMNS = 240
_MOST_ROWS = 64


@dataclass(frozen=True)
class Statistic:
    """A number that each normalisation layer records.

    Args:
        name: in the events.
        title: of the figure.
        note: its meaning.
        share: of 1, shown in per cent.
    """

    name: str
    title: str
    note: str
    share: bool = False


STATISTICS = (
    Statistic(
        "between_share",
        "Variance between workers",
        "Share of the batch's variance that lies between the workers' means: what local statistics "
        "would miss.",
        share=True,
    ),
    Statistic(
        "mean_gap",
        "Gap of the mean",
        "From the running mean to the batch's, in running standard deviations: root mean square "
        "over channels.",
    ),
    Statistic(
        "var_gap",
        "Gap of the deviation",
        "Logarithm of the batch's standard deviation over the running one (0.1: about 10 %): "
        "root mean square over channels.",
    ),
    Statistic(
        "r_clipped",
        "Clipped scales",
        "Share of channels whose correction r is at its bound; all of them while the schedule is "
        "at batch norm.",
        share=True,
    ),
    Statistic(
        "d_clipped",
        "Clipped shifts",
        "Share of channels whose correction d is at its bound; all of them while the schedule is "
        "at batch norm.",
        share=True,
    ),
)


@dataclass(frozen=True)
class Grid:
    """A statistic of a run.

    Args:
        layers: names, in the network's order.
        steps: of the records.
        values: (layers, steps), NaN where nothing is on record.
    """

    layers: list[str]
    steps: Array
    values: Array


def grid(run: Run, statistic: Statistic) -> Grid:
    """Collect a statistic of the layers that have it."""
    records = sorted(run.events.layers.items())
    layers = list(
        dict.fromkeys(
            name for _, layers in records for name, each in layers.items() if statistic.name in each
        )
    )
    row = {name: index for index, name in enumerate(layers)}
    values = np.full((len(layers), len(records)), np.nan)
    for column, (_, record) in enumerate(records):
        for name, each in record.items():
            if statistic.name in each:
                values[row[name], column] = each[statistic.name]
    values = np.where(np.isfinite(values), values.clip(-LARGEST, LARGEST), np.nan)
    return Grid(layers, np.array([step for step, _ in records], dtype=float), values)


def heat_figures(statistic: Statistic, runs: Sequence[Run]) -> dict[int, Markup]:
    """Draw a statistic for each run that has it, by the run's index."""
    grids = [grid(run, statistic) for run in runs]
    finite = np.concatenate([each.values[np.isfinite(each.values)] for each in grids])
    if not len(finite):
        return {}
    colours = _colours(finite)
    return {
        index: _heat_figure(statistic, each, colours, runs, index)
        for index, each in enumerate(grids)
        if np.isfinite(each.values).any()
    }


def _colours(finite: Array) -> ScalarMappable:
    # Not the maximum: at the first steps the running statistics are far off, and all others would
    # have one colour.
    high = float(np.quantile(finite, 0.99))
    return ScalarMappable(Normalize(0, high if high > 1e-12 else 1), "viridis")


def _heat_figure(
    statistic: Statistic, each: Grid, colours: ScalarMappable, runs: Sequence[Run], index: int
) -> Markup:
    rows = min(len(each.layers), _MOST_ROWS)
    figure = Figure(figsize=(WIDTH, 0.55 + 0.16 * max(rows, 4)), layout="constrained")
    axes = figure.add_subplot()
    first, last, cells = resample(each)
    high = colours.get_clim()[1]
    axes.imshow(
        cells,
        cmap=colours.cmap,
        vmin=0,
        vmax=high,
        aspect="auto",
        # the cells as they are; the browser enlarges them
        interpolation="none",
        extent=(first, last, len(each.layers) - 0.5, -0.5),
    )
    _label(axes, each, runs)
    bar = figure.colorbar(
        colours,
        ax=axes,
        pad=0.02,
        aspect=12 + rows / 2,
        extend="max" if np.nanmax(cells) > high else "neither",
    )
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.grid(False)
    bar.locator = MaxNLocator(4)
    if statistic.share:
        bar.formatter = PercentFormatter(1, decimals=None)
    bar.update_ticks()
    label = (
        f"{statistic.title} of {len(each.layers)} layers of {runs[index].name} over optimizer "
        "steps, as a heat map."
    )
    return to_svg(figure, f"{statistic.name}-{index}".replace("_", "-"), label)


def _label(axes: Axes, each: Grid, runs: Sequence[Run]) -> None:
    axes.grid(False)
    axes.set_xlim(*step_range(runs))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    stride = -(-len(each.layers) // _MOST_ROWS)
    shown = range(0, len(each.layers), stride)
    axes.set_yticks(shown, [shorten(plain(each.layers[index]), 22) for index in shown], fontsize=8)


def resample(each: Grid) -> tuple[float, float, Array]:
    """Average the records in columns of equal width; an empty column repeats the record before.

    Returns:
        The first and the last step, and the values.
    """
    first, last = float(each.steps[0]), float(each.steps[-1])
    count = min(len(each.steps), _MOST_COLUMNS)
    if count == 1:
        return first - 0.5, last + 0.5, each.values
    edges = np.searchsorted(each.steps, np.linspace(first, last, count + 1))
    edges[-1] = len(each.steps)
    columns = [_column(each.values, start, stop) for start, stop in pairwise(edges.tolist())]
    return first, last, np.stack(columns, axis=1)


def _column(values: Array, start: int, stop: int) -> Array:
    part = values[:, start:stop] if stop > start else values[:, max(start - 1, 0) : max(start, 1)]
    known = np.isfinite(part)
    counts = known.sum(axis=1)
    means = (np.where(known, part, 0) / np.maximum(counts, 1)[:, None]).sum(axis=1)
    return np.where(counts > 0, means, np.nan)
