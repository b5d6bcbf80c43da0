"""Figures of the curves of all runs over the optimizer's steps, one for each quantity."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)

from syncnorm.train.report.cut import cut_far_values
from syncnorm.train.report.hover import hover_strips
from syncnorm.train.report.marks import draw_marks
from syncnorm.train.report.run import Run
from syncnorm.train.report.series import Array, points, smooth, thin
from syncnorm.train.report.svg import WIDTH, run_colour, run_dashes, run_group, to_svg
from syncnorm.train.report.text import percent
from syncnorm.train.task.measures import is_share


@dataclass(frozen=True)
class Curve:
    """A quantity that runs record.

    Args:
        name: in the events.
        title: of the figure.
        note: definition of the quantity.
        log: use a logarithmic axis if all values are positive.
        share: of 1, shown in per cent.
        from_zero: start the axis at zero.
        noisy: draw a moving mean over the values.
        unit: of what is shown, in that of the record.
    """

    name: str
    title: str
    note: str
    log: bool = False
    share: bool = False
    from_zero: bool = False
    noisy: bool = True
    unit: float = 1.0

    def write(self, value: float) -> str:
        """Write a value for people."""
        return percent(value) if self.share else f"{value:.4g}"


CURVES = (
    Curve(
        "loss",
        "Training loss",
        "of each global batch; pale as recorded, strong its moving mean",
        log=True,
    ),
    Curve("lr", "Learning rate", "of the optimizer, at each step", noisy=False),
    Curve(
        "samples_per_second",
        "Throughput",
        "samples per second, all workers together",
        from_zero=True,
    ),
    Curve(
        "exchange_share",
        "Time in exchanges",
        "share of the time that the first worker was held up by them",
        share=True,
        from_zero=True,
    ),
    Curve(
        "memory",
        "Memory",
        "GiB at most so far: of the first worker's process, or of its tensors on a GPU",
        from_zero=True,
        noisy=False,
        unit=2**30,
    ),
    Curve("grad_norm", "Gradient norm", "of the whole gradient, before it is clipped", log=True),
)


def all_curves(runs: Sequence[Run]) -> list[Curve]:
    """List the curves of a page: the loss, the metrics of evaluations, and the others."""
    once = set(single_metrics(runs))
    names = dict.fromkeys(name for run in runs for name in run.events.metrics if name not in once)
    loss, *others = CURVES
    return [loss, *map(_metric_curve, names), *others]


def single_metrics(runs: Sequence[Run]) -> list[str]:
    """List the metrics that no run has more than once beside others: those of the end."""
    names = dict.fromkeys(name for run in runs for name in run.events.metrics)
    most = {name: max(len(run.events.curve(name)) for run in runs) for name in names}
    has_curves = any(count > 1 for count in most.values())
    return [name for name, count in most.items() if count == 1 and has_curves]


def _metric_curve(name: str) -> Curve:
    split, _, metric = name.partition("_")
    title = f"{split.capitalize()} {metric.replace('_', ' ')}"
    note = f"on the {split} set, all workers together"
    return Curve(name, title, note, share=is_share(metric), noisy=False)


def curve_figure(curve: Curve, runs: Sequence[Run]) -> Markup | None:
    """Draw a quantity of all runs; None if none has recorded it."""
    series = [points(run.events.curve(curve.name)) for run in runs]
    series = [(x, y / curve.unit) for x, y in series]
    finite = np.concatenate([y[np.isfinite(y)] for _, y in series])
    if not len(finite):
        return None
    figure, above, axes = _axes(len(runs) if any(run.events.marks for run in runs) else 0)
    for index, (x, y) in enumerate(series):
        _draw_curve(axes, x, y, index, curve.noisy)
    axes.set_xlim(*step_range(runs))
    _scale(axes, curve, series, finite)
    draw_marks(above, axes, runs)
    strips = hover_strips(axes, series, [run.name for run in runs], curve.write)
    return to_svg(figure, curve.name.replace("_", "-"), _describe(curve, runs, series), strips)


def _axes(lanes: int) -> tuple[Figure, Axes, Axes]:
    # In inches, and the same for all figures, so that their axes are aligned on the page.
    left, right, bottom, height, lane = 0.5, 0.12, 0.42, 2.0, min(0.1 * lanes, 0.5)
    total = bottom + height + 0.08 + lane + 0.02
    width = WIDTH - left - right
    figure = Figure(figsize=(WIDTH, total))
    axes = figure.add_axes((left / WIDTH, bottom / total, width / WIDTH, height / total))
    start = (bottom + height + 0.08) / total
    above = figure.add_axes(
        (left / WIDTH, start, width / WIDTH, (lane + 0.01) / total), sharex=axes
    )
    return figure, above, axes


def step_range(runs: Sequence[Run]) -> tuple[int, int]:
    """Return the range of steps of all runs, which is the same in all figures."""
    return 0, max(1, *(run.events.highest_step for run in runs))


def _draw_curve(axes: Axes, x: Array, y: Array, index: int, noisy: bool) -> None:
    colour = run_colour(index)
    smoothed = smooth(x, y) if noisy else None
    if smoothed is not None:
        (pale,) = axes.plot(*thin(x, y), color=colour, gid=run_group(index), linewidth=0.7)
        pale.set(alpha=0.28, zorder=1.9)
        x, y = smoothed
    # a single point has no line
    axes.plot(
        *thin(x, y),
        color=colour,
        gid=run_group(index),
        linestyle=run_dashes(index),
        marker="o" if len(x) <= 30 else "",
        markersize=2.6,
    )


def _scale(axes: Axes, curve: Curve, series: Sequence[tuple[Array, Array]], finite: Array) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("optimizer step", loc="right")
    if curve.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    if curve.from_zero:
        axes.set_ylim(0, max(1.08 * finite.max(), 1e-9))
    is_log = curve.log and bool(finite.min() > 0)
    if is_log:
        axes.set_yscale("log")
    cut_far_values(axes, series, is_log=is_log)
    if is_log:
        axes.yaxis.set_major_locator(LogLocator(subs=_subdivisions(*axes.get_ylim()), numticks=9))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _subdivisions(low: float, high: float) -> tuple[float, ...]:
    # Labels only at powers of ten would leave a short axis with one, or none.
    if high > 300 * low:
        return (1.0,)
    return (1.0, 2.0, 5.0) if high > 4 * low else tuple(1 + 0.5 * index for index in range(18))


def _describe(curve: Curve, runs: Sequence[Run], series: Sequence[tuple[Array, Array]]) -> str:
    ends = []
    for run, (x, y) in zip(runs, series, strict=True):
        known = np.flatnonzero(np.isfinite(y))
        if len(known):
            ends.append(
                f"{run.name} from {y[known[0]]:.4g} to {y[known[-1]]:.4g} at step "
                f"{x[known[-1]]:.0f}"
            )
    return f"{curve.title} over optimizer steps: {'; '.join(ends)}."
