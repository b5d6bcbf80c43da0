"""Adaptive momentum: a weight of batches in running statistics between two averages.

It is the cumulative average's at one end and the exponential average's at the other.
arXiv:2310.08855; github.com/lvyilin/AdaB2N. Their code keeps the last weight; here it comes from the
number of the step, so that a run that goes on from a checkpoint has it, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncnorm.errors import InputError


def momentum_at(step: int | Tensor, momentum: float, kappa: float) -> Tensor:
    """Give the weight eta of a batch in the running statistics.

        eta_1 = momentum^kappa        eta_t = eta_{t-1} / (eta_{t-1} + (1 - momentum)^kappa)

    That is 1 / t for kappa = 0, a cumulative average, and `momentum` for kappa = 1. Its inverse
    follows 1 + (1 - momentum)^kappa / eta_{t-1}, a geometric series.

    Any layer may use it: set `layer.momentum = float(momentum_at(step, 0.1, 0.5))` before a step.

    Args:
        step: t, from 1; what is less counts as 1.
        momentum: in (0, 1].
        kappa: in [0, 1].

    Returns:
        (), float64.

    Raises:
        InputError: an argument is out of its range.
    """
    if not 0 <= kappa <= 1:
        raise InputError(
            f"`kappa` must be in [0, 1], from a cumulative average to an exponential one, got "
            f"{kappa}."
        )
    if not 0 < momentum <= 1:
        raise InputError(f"`momentum` must be in (0, 1] to adapt, got {momentum}. Try 0.1.")
    earlier = torch.as_tensor(step, dtype=torch.float64).clamp(min=1) - 1
    ratio = (1 - momentum) ** kappa
    power = ratio**earlier
    series = earlier if ratio == 1 else (1 - power) / (1 - ratio)
    return 1 / (series + power * momentum**-kappa)
