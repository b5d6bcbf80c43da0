"""Paired timing: candidates take turns in every round, so that what disturbs one disturbs all.

Absolute times on a shared machine mean little; the ratio within a round does.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


def fix_allocator() -> None:
    """Restart this program with glibc's allocator told to keep memory, unless it already is."""
    wanted = {**ALLOCATOR, "OMP_NUM_THREADS": "1"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def settings() -> str:
    """The allocator's settings in force, for the head of a table."""
    return ", ".join(f"{name}={os.environ.get(name, 'unset')}" for name in ALLOCATOR)


def page_faults() -> int:
    """Minor page faults of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Ratio(NamedTuple):
    """Median of the per-round ratios and its 95 % interval (order statistics of the binomial)."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def rounds(
    candidates: Mapping[str, Callable[[], None]], count: int, warm_up: int = 3
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round; the order rotates from round to round."""
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warm_up + count):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
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
