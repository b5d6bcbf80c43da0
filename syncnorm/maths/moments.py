"""Per-channel moments: from raw sums to mean and variance, and into the running statistics.

    n = sum w        mean = sum w x / n        m2 = sum w (x - mean)^2        var = m2 / n

All in float64. Raw sums (the wire format) add over workers; everything else is derived from their total.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Weighted moments of C channels.

    Attributes:
        count: total weight n, shape (), float64.
        mean: weighted mean, shape (C,), float64.
        m2: weighted sum of squared deviations from the mean, shape (C,), float64, >= 0.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @property
    def var(self) -> Tensor:
        """Biased variance m2 / n, shape (C,); 0 where n = 0."""
        return self.m2 * reciprocal(self.count)

    def invstd(self, eps: float) -> Tensor:
        """1 / sqrt(var + eps), shape (C,); 0 where no value or a single one counts.

        The output there is the bias, and the gradient 0, rather than a rounding error times 1 / sqrt(eps).
        """
        is_single = (self.count <= 1) & (self.m2 == 0)
        return torch.where(is_single, 0.0, torch.rsqrt(self.var + eps))


def reciprocal(count: Tensor) -> Tensor:
    """1 / count, and 0 where count = 0. NaN stays NaN: a fault must not pass for an empty batch."""
    return torch.where(count == 0, 0.0, 1.0 / count)


def of_sums(sums: Tensor) -> Moments:
    """Moments from the raw sums [sum wx (C), sum wx^2 (C), sum w (1)], shape (2C+1,), float64.

    Raw sums lose digits with the square of mean/std: in float64 about 1e-16 * (mean/std)^2 of var.
    """
    channels = (sums.numel() - 1) // 2
    total, squares, count = sums.split((channels, channels, 1))
    count = count.squeeze(0)
    mean = total * reciprocal(count)
    m2 = (squares - total * mean).clamp(min=0.0)
    return Moments(count, mean, m2)


def update_running_(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    moments: Moments,
    momentum: float | None,
) -> None:
    """Move the running statistics towards the batch's, in place and without reading a value on the host.

        running_mean += f * (mean - running_mean)        running_var += f * (m2 / (n - 1) - running_var)

    f is `momentum`, or 1 / num_batches_tracked when `momentum` is None (cumulative average). Weights are
    frequencies: n <= 1 leaves running_var as it is, and n = 0 (or NaN, a fault) changes nothing at all.
    """
    count = moments.count
    if num_batches_tracked is not None:
        num_batches_tracked += (count > 0).to(num_batches_tracked.dtype)
    if momentum is None:
        if num_batches_tracked is None:
            raise AssertionError("a cumulative average needs its counter")
        factor = 1.0 / num_batches_tracked.to(torch.float64).clamp(min=1.0)
    else:
        factor = momentum
    _blend_(running_mean, moments.mean, factor, count > 0)
    _blend_(running_var, moments.m2 / (count - 1.0), factor, count > 1)


def _blend_(running: Tensor, value: Tensor, factor: float | Tensor, where: Tensor) -> None:
    wide = running.to(torch.float64)
    running.copy_(torch.where(where, wide + factor * (value - wide), wide))
