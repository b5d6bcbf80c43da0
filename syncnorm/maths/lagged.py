"""Lagged statistics: averages of the pooled moments and gradient means of earlier steps.

    forward   mean, var      <- mean, var      + forward_rate  * (pooled - mean, var)
    backward  mean g, g xhat <- mean g, g xhat + backward_rate * (pooled - mean g, g xhat)
    drift     = max over channels of |pooled mean - mean| / sqrt(var + eps)
                and of |log((pooled var + eps) / (var + eps))| / 2

No step waits for its own exchange. The drift is that of a step's pooled moments from the average
which that step used. A layer whose drift exceeds `max_drift` waits for pooling in the next step.
All of it is computed from pooled numbers, so all ranks decide the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from syncnorm.errors import InputError
from syncnorm.maths.moments import Moments


@dataclass(frozen=True)
class Lagged:
    """Options of `sync="lagged"`; pass an instance as `sync` to change them.

    Args:
        forward_rate: weight of the newest pooled moments in their average, in (0, 1].
        backward_rate: weight of the newest pooled gradient means in theirs, in (0, 1].
        max_drift: distance of a step's pooled moments from the average that it used, in standard
            deviations or half log-ratios of variance, beyond which a layer waits for pooling in the
            next step; >= 0. Infinity turns the guard off.

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


def drift(batch: Moments, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """The distance of the pooled moments from their average, shape ()."""
    distance = (batch.mean - mean).abs() / torch.sqrt(var + eps)
    ratio = torch.log((batch.var + eps) / (var + eps)).abs() / 2
    return torch.maximum(distance, ratio).amax()
