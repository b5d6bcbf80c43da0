"""The loss over a plane through the weights, with normalisation in three modes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from syncnorm.diagnose.observe import observe
from syncnorm.diagnose.population import population
from syncnorm.diagnose.problem import Gradient, Problem
from syncnorm.diagnose.smoothness import shifted
from syncnorm.model.modes import evaluating

POINTS = 7
MODES = ("evaluation", "batch", "recalibrated")


def measure_surface(problem: Problem, points: int = POINTS) -> dict[str, Any]:
    """Evaluate the loss of the first batch on a grid of weights.

        f(a, b) = loss(theta + a d1 + b d2)      a, b in [-1, 1], `points` of each
        d <- d ||w|| / (||d|| + 1e-10) for each filter w; 0 for parameters of one dimension

    in each mode of the normalisation: by the running statistics as they are ("evaluation"), by the
    batch ("batch"), and by running statistics that are those of the batch at that point
    ("recalibrated"). Where they differ, a plane drawn by running statistics shows these rather than
    the weights.

    The samples lie on the workers, not the points: so all modes work alike, and with layers that
    pool.

    *Collectives*: for each point those of a training forward and of `observe`, and one sum of 3
    numbers for each point at the end; every worker must call.

    References:
        Li et al., Visualizing the Loss Landscape of Neural Nets, arXiv:1712.09913, section 4.
        Deviations: a coarse grid, one batch, and the modes.
    """
    directions = [random_direction(problem, number) for number in (1, 2)]
    axis = torch.linspace(-1, 1, points, dtype=torch.float64).tolist()
    batch: list[float] = []
    local: list[Tensor] = []
    for a in axis:
        for b in axis:
            by = {name: a * part + b * directions[1][name] for name, part in directions[0].items()}
            with shifted(problem.parameters, by):
                loss, sums = observe(problem, [0])
                batch.append(loss)
                with evaluating(problem.model):
                    local.append(problem.local_loss([0]))
                    with population(problem, sums):
                        local.append(problem.local_loss([0]))
    pooled = problem.sum(torch.stack(local), "surface").view(-1, 2)
    columns = dict(zip(MODES, (pooled[:, 0].tolist(), batch, pooled[:, 1].tolist()), strict=True))
    return {
        "axis": axis,
        "modes": {
            mode: [values[i * points : (i + 1) * points] for i in range(points)]
            for mode, values in columns.items()
        },
    }


def random_direction(problem: Problem, seed: int) -> Gradient:
    """Draw a direction, the same on all workers, each filter as long as that of the weights."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, p in problem.parameters.items():
        drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(problem.device)
        found[name] = filter_normalised(drawn, p.detach().double())
    return found


def filter_normalised(direction: Tensor, weight: Tensor) -> Tensor:
    """Give each filter of a direction the length of the weight's; 0 for one dimension or none."""
    if weight.ndim < 2:
        return torch.zeros_like(weight)
    rows = direction.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1)
    ratio = rows[1] / (rows[0] + 1e-10)
    return direction * ratio.view(-1, *[1] * (weight.ndim - 1))
