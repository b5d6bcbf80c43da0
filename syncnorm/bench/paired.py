"""Paired timing: candidates take turns in every round, so that what disturbs one disturbs all.

Absolute times on a shared machine mean little; the ratio within a round does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Ratio(NamedTuple):
    """Median of the per-round ratios and its 95 % interval (order statistics of the binomial)."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def rounds(
    candidates: Mapping[str, Callable[[], None]],
    count: int,
    warm_up: int = 3,
    goes_on: Callable[[int], bool] = lambda done: True,
    line_up: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round; the order rotates from round to round.

    Args:
        candidates: by name.
        count: of rounds, at most.
        warm_up: rounds before these.
        goes_on: called before each round with the number of those that count so far; False ends.
        line_up: called before each candidate, outside of its time. Of workers that have just run
            what has no messages one is ahead, and the other's delay is none of what comes next.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warm_up + count):
        if turn >= warm_up and not goes_on(turn - warm_up):
            break
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            line_up()
            start = time.perf_counter()
            candidates[name]()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(of: list[float], to: list[float]) -> Ratio:
    """The distribution-free interval for the median of the paired ratios."""
    values = sorted(a / b for a, b in zip(of, to, strict=True))
    n = len(values)
    reach = int(0.98 * n**0.5) + 1
    middle = n // 2
    return Ratio(
        statistics.median(values),
        values[max(0, middle - reach)],
        values[min(n - 1, middle + reach)],
    )
