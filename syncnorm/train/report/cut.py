"""Axes that one diverged run does not ruin: what is far off is cut, and marked."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from syncnorm.train.report.marks import apart
from syncnorm.train.report.series import Array
from syncnorm.train.report.svg import run_colour, run_group

# What most of a run's values lie between.
_QUANTILES = (0.02, 0.98)
# Of a nearly constant curve: a share of its value, or half a power of ten.
_LEAST_SPAN = 0.5
# Values further off than so many times the common range are cut; the axis goes half of it beyond.
_FAR, _MARGIN = 4.0, 0.5
# Between the axis and what is not cut, as a share of the range.
_PAD = 0.05


def cut_far_values(axes: Axes, series: Sequence[tuple[Array, Array]], *, is_log: bool) -> None:
    """Limit the axis to the range that at least half of the runs keep, where others leave it far.

    A triangle of the run's colour stands where its values are beyond, and a text has the furthest.
    """
    known = [y[np.isfinite(y)] for _, y in series]
    scaled = [np.log10(y) if is_log else y for y in known if len(y)]
    ranges = np.array([np.quantile(y, _QUANTILES) for y in scaled])  # (runs, 2)
    middle = (len(ranges) - 1) // 2
    low, high = np.sort(ranges[:, 0])[::-1][middle], np.sort(ranges[:, 1])[middle]
    low, high = min(low, high), max(low, high)
    span = max(high - low, _LEAST_SPAN * (1 if is_log else abs(high)), 1e-9)
    everything = np.concatenate(scaled)
    lowest, highest = float(everything.min()), float(everything.max())
    is_high, is_low = highest > high + _FAR * span, lowest < low - _FAR * span
    if not (is_high or is_low):
        return
    top = high + _MARGIN * span if is_high else highest
    bottom = low - _MARGIN * span if is_low else lowest
    pad = _PAD * (top - bottom)
    starts_at_zero = axes.get_ylim()[0] == 0
    limits = (
        0.0 if starts_at_zero else _value(bottom if is_low else bottom - pad, is_log),
        _value(top if is_high else top + pad, is_log),
    )
    axes.set_ylim(*limits)
    if is_high:
        _mark(axes, series, highest, limits[1], is_log=is_log, is_above=True)
    if is_low and not starts_at_zero:
        _mark(axes, series, lowest, limits[0], is_log=is_log, is_above=False)


def _value(scaled: float, is_log: bool) -> float:
    return float(10**scaled) if is_log else float(scaled)


def _mark(
    axes: Axes,
    series: Sequence[tuple[Array, Array]],
    furthest: float,
    limit: float,
    *,
    is_log: bool,
    is_above: bool,
) -> None:
    place = 1.0 if is_above else 0.0
    for index, (x, y) in enumerate(series):
        with np.errstate(invalid="ignore"):
            beyond = x[y > limit] if is_above else x[y < limit]
        steps = apart([int(step) for step in beyond], 5 * axes.get_xlim()[1])
        axes.plot(
            steps,
            [place] * len(steps),
            transform=axes.get_xaxis_transform(),
            color=run_colour(index),
            linestyle="",
            marker="^" if is_above else "v",
            markersize=4,
            clip_on=False,
            gid=run_group(index),
        )
    sign = "\u25b2" if is_above else "\u25bc"
    text = f"{sign} cut, as far as {_value(furthest, is_log):.3g}"
    axes.text(
        1, 0.97 if is_above else 0.03, text, transform=axes.transAxes, ha="right",
        va="top" if is_above else "bottom",
    )  # fmt: skip
