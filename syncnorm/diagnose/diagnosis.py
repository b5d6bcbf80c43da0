"""All measures of a problem, one after the other, and the time that they will take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from syncnorm.diagnose.covariate import MOST_LAYERS, measure_covariate_shift
from syncnorm.diagnose.gradients import measure_gradients
from syncnorm.diagnose.problem import Problem
from syncnorm.diagnose.shift import measure_shift
from syncnorm.diagnose.smoothness import STEPS, measure_smoothness
from syncnorm.diagnose.statistics import measure_statistics
from syncnorm.diagnose.surface import POINTS, measure_surface
from syncnorm.errors import InputError
from syncnorm.model.sample import uncompiled

Cost = Callable[[Problem], int]


@dataclass(frozen=True)
class Measure:
    """One measure.

    Args:
        title: in a few words.
        run: computes it, with the early model if there is one.
        cost: what it ticks on this worker: 1 for a forward, 3 for a forward and a backward.
        needs_early: True if there is nothing to compute without an early model.
    """

    title: str
    run: Callable[[Problem, nn.Module | None], dict[str, Any]]
    cost: Cost
    needs_early: bool = False


def _first(problem: Problem) -> int:
    return len(problem.batches[0])


MEASURES = {
    "statistics": Measure(
        "statistics of the normalisation layers",
        lambda problem, _: measure_statistics(problem),
        lambda problem: 2 * problem.passes,
    ),
    "gradients": Measure(
        "the gradient by depth",
        lambda problem, _: measure_gradients(problem),
        lambda problem: 3 * problem.passes,
    ),
    "smoothness": Measure(
        "the loss along the gradient",
        lambda problem, _: measure_smoothness(problem),
        lambda problem: 3 * (1 + len(STEPS)) * problem.passes,
    ),
    "shift": Measure(
        "distributions since an early checkpoint",
        lambda problem, early: measure_shift(problem, early) if early is not None else {},
        lambda problem: 4 * problem.passes,
        needs_early=True,
    ),
    "covariate": Measure(
        "internal covariate shift by a step",
        lambda problem, _: measure_covariate_shift(problem),
        lambda problem: (3 * (1 + MOST_LAYERS) + 2) * _first(problem),
    ),
    "surface": Measure(
        "the loss around the weights",
        lambda problem, _: measure_surface(problem),
        lambda problem: 3 * POINTS**2 * _first(problem),
    ),
}
"""The measures by name, in the order in which they are computed."""


@dataclass(frozen=True)
class Diagnosis:
    """What was measured.

    Args:
        measures: plain numbers by measure, the same on all workers.
        seconds: by measure, this worker's own.
    """

    measures: dict[str, dict[str, Any]]
    seconds: dict[str, float] = field(default_factory=dict)


def choose(only: Sequence[str] | None, *, has_early: bool) -> list[str]:
    """List the measures to compute.

    Raises:
        InputError: one is not known, or cannot be computed.
    """
    for name in only or ():
        if name not in MEASURES:
            raise InputError(f"`only` must be some of {', '.join(MEASURES)}, got {name!r}")
        if MEASURES[name].needs_early and not has_early:
            raise InputError(
                f"`only` must leave out {name!r}, which needs an earlier checkpoint: there is none"
            )
    return [
        name
        for name, each in MEASURES.items()
        if (only is None or name in only) and (has_early or not each.needs_early)
    ]


@uncompiled()
def diagnose(
    problem: Problem,
    early: nn.Module | None = None,
    only: Sequence[str] | None = None,
    begin: Callable[[dict[str, int], float], object] = lambda costs, seconds: None,
) -> Diagnosis:
    """Compute measures of a problem; the model is as before afterwards.

    *Collectives*: those of `Problem.begin` and of each measure; every worker must call, with the
    same names.

    Args:
        problem: what is measured.
        early: an earlier state of the model, for "shift".
        only: names of `MEASURES`; None: all that can be computed.
        begin: called before the first measure with this worker's cost of each, and the seconds
            that all of them will take, about.

    Raises:
        InputError: `only` is not as it should be.
        FaultError: the loss cannot be computed on some worker; on all of them.
    """
    names = choose(only, has_early=early is not None)
    start = time.monotonic()
    problem.begin()
    forward = (time.monotonic() - start) / max(1, problem.passes)
    if not problem.exchanges:  # it was made twice
        forward /= 2
    costs = {name: MEASURES[name].cost(problem) for name in names}
    begin(costs, forward * sum(costs.values()))
    measures, seconds = {}, {}
    for name in names:
        start = time.monotonic()
        measures[name] = finite(MEASURES[name].run(problem, early))
        seconds[name] = time.monotonic() - start
    return Diagnosis(measures, seconds)


def finite(value: Any) -> Any:
    """Put None in the place of numbers that are not finite, which JSON has not."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
