"""The loss and its gradient along the gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from syncnorm.diagnose.problem import Gradient, Problem, difference, norm
from syncnorm.model.modes import kept

STEPS = (0.5, 1.0, 2.0, 4.0)
"""Steps along the gradient, in learning rates."""


def measure_smoothness(problem: Problem, steps: Sequence[float] = STEPS) -> dict[str, Any]:
    """Go along the gradient of each batch, and see how the loss and its gradient change.

        theta(a) = theta - a g      g = gradient of the batch at theta, a = step * lr
        loss_range     = min, max over a of loss(theta(a))
        predictiveness = min, max over a of ||gradient(theta(a)) - g||
        smoothness     = max over a of ||gradient(theta(a)) - g|| / (a ||g||)

    Gradient descent lowers the loss for sure while lr < 2 / smoothness. Each figure is the mean over
    the batches, whose samples stay the same along the way.

    *Statistics*: those of the batch; running statistics are frozen.

    *Collectives*: those of a gradient for each batch and step, and for each batch; every worker
    must call, with the same steps.

    Returns:
        "loss" and "norm" of the gradient at theta, the three figures, and "losses" by step.

    References:
        Santurkar et al., arXiv:1805.11604, section 3.2 and figure 4. Deviation: the steps, which
        they state for their networks, are multiples of the learning rate here.
    """
    rows = [_along(problem, number, steps) for number in problem.everything]

    def mean(name: str, reduce: Any = None) -> float:
        values = [row[name] if reduce is None else reduce(row[name]) for row in rows]
        return sum(values) / len(values)

    return {
        "steps": list(steps),
        "loss": mean("loss"),
        "norm": mean("norm"),
        "losses": [sum(row["losses"][i] for row in rows) / len(rows) for i in range(len(steps))],
        "loss_range": [mean("losses", _least), mean("losses", _most)],
        "predictiveness": [mean("changes", _least), mean("changes", _most)],
        "smoothness": mean("smoothness"),
    }


def _along(problem: Problem, number: int, steps: Sequence[float]) -> dict[str, Any]:
    loss, g = problem.gradient([number])
    length = norm(g)
    losses, changes, ratios = [], [], [0.0]
    for step in steps:
        a = step * problem.lr
        with moved(problem, g, -a):
            there, gradient = problem.gradient([number])
        change = norm(difference(gradient, g))
        losses.append(there)
        changes.append(change)
        if a * length != 0:  # NaN counts
            ratios.append(change / (a * length))
    return {
        "loss": loss,
        "norm": length,
        "losses": losses,
        "changes": changes,
        "smoothness": _most(ratios),
    }


def _least(values: Sequence[float]) -> float:
    """The smallest value; NaN if one is, which Python's own may pass over."""
    return torch.tensor(values, dtype=torch.float64).min().item()


def _most(values: Sequence[float]) -> float:
    """The largest value; NaN if one is."""
    return torch.tensor(values, dtype=torch.float64).max().item()


@contextmanager
def moved(problem: Problem, direction: Gradient, by: float) -> Iterator[None]:
    """Have parameters be elsewhere within the block."""
    with shifted(problem.parameters, {name: by * part for name, part in direction.items()}):
        yield


@contextmanager
def shifted(parameters: Mapping[str, Tensor], by: Mapping[str, Tensor]) -> Iterator[None]:
    """Add to parameters within the block; those that are not named stay."""
    with kept(parameters) as before:
        with torch.no_grad():
            for name, part in by.items():
                moved = before[name].double() + part.to(before[name].device)
                parameters[name].copy_(moved)
        yield
