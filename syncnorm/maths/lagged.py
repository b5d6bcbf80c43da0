"""Lagged statistics: averages of the pooled moments and gradient means of earlier steps.

    forward   mean, var      <- mean, var      + forward_rate  * (pooled - mean, var)
    backward  mean g, g xhat <- mean g, g xhat + backward_rate * (pooled - mean g, g xhat)
    drift     = max over channels of |pooled mean - mean| / sqrt(var + eps)
                and of |log((pooled var + eps) / (var + eps))| / 2

No step waits for its own exchange. The drift is that of a step's pooled moments from the average
which that step used. A layer whose drift exceeds `max_drift` waits for pooling in the next step.
It waits in its first two steps, too: in the first there is no average, and the second is apart from
the first one's by the first change of the weights, a large one, which no drift has shown before.
All of it is computed from pooled numbers, so all ranks decide the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from syncnorm.errors import InputError
from syncnorm.maths.moments import Moments, reciprocal


@dataclass(frozen=True)
class Lagged:
    """Options of `sync="lagged"`; pass an instance as `sync` to change them.

    Args:
        forward_rate: weight of the newest pooled moments in their average, in (0, 1].
        backward_rate: weight of the newest pooled gradient means in theirs, in (0, 1].
        max_drift: distance of a step's pooled moments from the average that it used, in standard
            deviations or half log-ratios of variance, beyond which a layer waits for pooling in the
            next step; >= 0. Infinity turns the guard off, but for the first two steps.

    Raises:
        InputError: a value is out of range.
    """

    forward_rate: float = 0.3
    backward_rate: float = 0.1
    max_drift: float = 0.35

    def __post_init__(self) -> None:
        for name, rate in (
            ("forward_rate", self.forward_rate),
            ("backward_rate", self.backward_rate),
        ):
            if not 0 < rate <= 1:
                raise InputError(
                    f"`{name}` must be in (0, 1], got {rate}. It is the weight of the newest value."
                )
        if not self.max_drift >= 0:
            raise InputError(
                f"`max_drift` must be >= 0, got {self.max_drift}. Infinity turns the guard off."
            )

    @cached_property
    def max_ratio(self) -> float:
        """The ratio of two variances, the larger over the smaller, whose drift is `max_drift`."""
        try:
            return math.exp(2 * self.max_drift)
        except OverflowError:
            return math.inf


def has_drifted(batch: Moments, mean: Tensor, var: Tensor, eps: float, options: Lagged) -> Tensor:
    """True if the pooled moments are further than `max_drift` from their average, shape ().

    By sums and products alone, which are rounded alike everywhere: libraries take logarithms and
    roots to other last bits, and all workers must decide the same.
    """
    old, new = var + eps, batch.var + eps
    is_far = (batch.mean - mean).square() > old * (options.max_drift * options.max_drift)
    is_other = (new > old * options.max_ratio) | (old > new * options.max_ratio)
    return (is_far | is_other).any()


def snapshots(averages: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """Copy the averages of layers on one device: [mean, m2, n, gradient means] of each.

    Each has the shape (4C+1,), float64. An average has no count of its own; any above 1 says that
    its variance is one.

    Args:
        averages: mean, var, each (C,), and gradient means, (2, C), of each layer.
    """
    sizes = [mean.numel() for mean, _, _ in averages]
    m2 = torch.cat([var for _, var, _ in averages]).double().mul_(2.0)
    several = m2.new_full((1,), 2.0)
    parts: list[Tensor] = []
    for (mean, _, gradient), spread in zip(averages, m2.split(sizes), strict=True):
        parts += [mean, spread, several, gradient.flatten()]
    return list(torch.cat(parts).split([4 * size + 1 for size in sizes]))


def follow_moments_(
    batch: Moments,
    mean: Tensor,
    var: Tensor,
    updates: Tensor,
    waits: Tensor,
    eps: float,
    options: Lagged,
) -> None:
    """Decide by the average that the last step used whether the next one waits, and move it.

    Moments that are not finite (an overflow somewhere) enter nothing; the layer waits until there
    are others. In place.

    Args:
        batch: the pooled moments.
        mean, var: the averages, (C,).
        updates: the number of values in them, shape ().
        waits: 1 if the layer is to wait, or 0; shape ().
        eps: of the layer.
        options: the rates and the guard.
    """
    is_finite = batch.mean.isfinite().all() & batch.m2.isfinite().all()
    is_new, is_first = (batch.count > 0) & is_finite, updates == 0
    old_mean, old_var = mean.double(), var.double()
    is_to_wait = has_drifted(batch, old_mean, old_var, eps, options) | is_first
    waits.copy_(torch.where(is_new, is_to_wait, waits | ~is_finite))
    rate = _rate(updates, options.forward_rate)
    mean.copy_(torch.where(is_new, old_mean + rate * (batch.mean - old_mean), old_mean))
    var.copy_(torch.where(is_new, old_var + rate * (batch.var - old_var), old_var))
    updates += is_new


def follow_gradients_(sums: Tensor, gradient: Tensor, updates: Tensor, options: Lagged) -> None:
    """Move the average gradient means towards the pooled ones, in place.

    What is not finite (an overflow) enters nothing.

    Args:
        sums: [sum g, sum g xhat, n] of all workers, shape (2C+1,).
        gradient: the averages, (2, C).
        updates: the number of values in them, shape ().
        options: the rates.
    """
    totals, count = sums[:-1].view(2, -1), sums[-1]
    is_new = (count > 0) & totals.isfinite().all()
    rate, old = _rate(updates, options.backward_rate), gradient.double()
    moved = old + rate * (totals * reciprocal(count) - old)
    gradient.copy_(torch.where(is_new, moved, old))
    updates += is_new


def _rate(updates: Tensor, rate: float) -> Tensor:
    """The weight of the newest value; the first is taken whole, with nothing to average it with."""
    return torch.where(updates == 0, 1.0, torch.full_like(updates, rate, dtype=torch.float64))
