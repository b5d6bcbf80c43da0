"""Internal covariate shift by a step of training, by two definitions."""

from __future__ import annotations

import math
from typing import Any

from syncnorm.diagnose.observe import observe, watched
from syncnorm.diagnose.problem import Gradient, Problem, difference, norm
from syncnorm.diagnose.smoothness import moved, shifted

MOST_LAYERS = 6


def measure_covariate_shift(problem: Problem, most: int = MOST_LAYERS) -> dict[str, Any]:
    """Measure what a step lr g of all other layers does to a layer.

    By what enters it, in front of each normalisation, over the channels of a layer:

        mean_drift = RMS of (mean' - mean) / sqrt(var + eps)
        std_drift  = RMS of log((var' + eps) / (var + eps)) / 2

    By its gradient, for at most `most` groups of parameters (those of a module), evenly chosen:

        G = gradient at theta      G' = gradient where all groups before it have taken the step
        change = ||G - G'||, also relative to ||G||; cosine = <G, G'> / (||G|| ||G'||)

    All is of the first batch, which stays the same.

    *Collectives*: those of 1 + `most` gradients and of two of `observe`; every worker must call.

    References:
        Ioffe and Szegedy, arXiv:1502.03167, section 2; Santurkar et al., arXiv:1805.11604,
        definition 2.1. Deviations: some of the layers; the step is plain gradient descent.
    """
    _, g = problem.gradient([0])
    groups: dict[str, list[str]] = {}
    for name in g:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    order = list(groups)
    # The first has nobody before it.
    number = min(most, len(order) - 1)
    chosen = [1 + (len(order) - 2) * i // max(1, number - 1) for i in range(max(0, number))]
    gradients: dict[str, Any] = {}
    for index in dict.fromkeys(chosen):
        before = [name for each in order[:index] for name in groups[each]]
        step: Gradient = {name: -problem.lr * g[name] for name in before}
        with shifted(problem.parameters, step):
            _, there = problem.gradient([0])
        own = groups[order[index]]
        gradients[order[index]] = _compare(
            {name: g[name] for name in own}, {name: there[name] for name in own}
        )
    return {"inputs": _input_drift(problem, g), "gradients": gradients}


def _compare(g: Gradient, there: Gradient) -> dict[str, float | None]:
    one, other, change = norm(g), norm(there), norm(difference(g, there))
    product = math.fsum(float((g[name] * there[name]).sum()) for name in g)
    return {
        "change": change,
        "relative": change / one if one else None,
        "cosine": product / (one * other) if one * other else None,
    }


def _input_drift(problem: Problem, g: Gradient) -> dict[str, dict[str, float]]:
    _, sums = observe(problem, [0])
    with moved(problem, g, -problem.lr):
        _, later = observe(problem, [0])
    drifts = {}
    for name, layer in watched(problem.model).items():
        (mean, var), (mean2, var2) = sums[name].moments(), later[name].moments()
        eps = float(getattr(layer, "eps", 0.0))
        shift, log = (mean2 - mean) / (var + eps).sqrt(), ((var2 + eps) / (var + eps)).log() / 2
        drifts[name] = {
            "mean_drift": float(shift.square().mean().sqrt()),
            "std_drift": float(log.square().mean().sqrt()),
        }
    return drifts
