"""Reduction of curves to a bounded number of points."""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MOST_POINTS = 2000
LARGEST = 1e30
_SMOOTH_POINTS = 400
_SMOOTH_WIDTH = 9


def points(curve: Mapping[int, float]) -> tuple[Array, Array]:
    """Return the steps in order and their values, for a plot.

    Values that are not finite become NaN; the others are clipped, so that no axis overflows.
    """
    steps = sorted(curve)
    values = np.array([curve[step] for step in steps], dtype=float)
    return np.array(steps, dtype=float), np.where(
        np.isfinite(values), values.clip(-LARGEST, LARGEST), np.nan
    )


def thin(x: Array, y: Array) -> tuple[Array, Array]:
    """Keep the lowest and the highest point of each of some buckets, which looks the same."""
    if len(x) <= MOST_POINTS:
        return x, y
    kept: set[int] = {0, len(x) - 1}
    for start, stop in _buckets(len(x), MOST_POINTS // 2 - 1):
        part = y[start:stop]
        # A bucket without any value keeps one point, and so stays a gap.
        kept.add(start + int(np.argmin(np.where(np.isnan(part), np.inf, part))))
        kept.add(start + int(np.argmax(np.where(np.isnan(part), -np.inf, part))))
    index = np.array(sorted(kept))
    return x[index], y[index]


def smooth(x: Array, y: Array) -> tuple[Array, Array] | None:
    """Average over a moving window of about 2 % of the curve; None for a short curve."""
    if len(x) < _SMOOTH_WIDTH**2:
        return None
    buckets = _buckets(len(x), min(len(x), _SMOOTH_POINTS))
    means = np.array([_mean(y[start:stop]) for start, stop in buckets])
    reach = _SMOOTH_WIDTH // 2
    # Not a running sum, which loses all smaller digits after a peak of 1e30.
    smoothed = [
        _mean(means[max(0, index - reach) : index + reach + 1]) for index in range(len(means))
    ]
    return np.array([x[start:stop].mean() for start, stop in buckets]), np.array(smoothed)


def _buckets(length: int, count: int) -> list[tuple[int, int]]:
    edges = np.linspace(0, length, count + 1).astype(int).tolist()
    return list(pairwise(edges))


def _mean(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
