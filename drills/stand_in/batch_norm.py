"""The operators of `torch.nn.SyncBatchNorm`, which torch has for CUDA alone, on tensors of a CPU.

y = (x - mean) * invstd * weight + bias
dx = (g - sum g / n - (x - mean) * invstd^2 * sum g (x - mean) / n) * invstd * weight
"""

from __future__ import annotations

import torch
from torch import Tensor


def _over(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _facing(c: Tensor | None, x: Tensor, otherwise: float) -> Tensor | float:
    return otherwise if c is None else c.double().view(-1, *[1] * (x.ndim - 2))


def _wide_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.double(), _over(x), correction=0)
    return mean.to(_wide_type(x)), (var + eps).rsqrt().to(_wide_type(x))


def batch_norm_gather_stats_with_counts(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    means, n = mean.double(), counts.double().view(-1, 1)
    squares = n * (invstd.double() ** -2 - eps + means.square())
    pooled = (n * means).sum(0) / n.sum()
    var = squares.sum(0) / n.sum() - pooled.square()
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(pooled.to(running_mean.dtype), momentum)
        running_var.lerp_((var * n.sum() / (n.sum() - 1)).to(running_var.dtype), momentum)
    return pooled.to(mean.dtype), (var + eps).rsqrt().to(mean.dtype)


def batch_norm_elemt(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    eps: float,
) -> Tensor:
    scale = _facing(invstd, x, 1.0) * _facing(weight, x, 1.0)
    return ((x.double() - _facing(mean, x, 0.0)) * scale + _facing(bias, x, 0.0)).to(x.dtype)


def batch_norm_backward_reduce(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    input_g: bool,
    weight_g: bool,
    bias_g: bool,
) -> tuple[Tensor, ...]:
    total = g.double().sum(_over(x))
    product = (g.double() * (x.double() - _facing(mean, x, 0.0))).sum(_over(x))
    kind = mean.dtype if weight is None else weight.dtype
    sums = total.to(mean.dtype), product.to(mean.dtype)
    return *sums, (product * invstd.double()).to(kind), total.to(kind)


def batch_norm_backward_elemt(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_g: Tensor,
    product: Tensor,
    count: Tensor,
) -> Tensor:
    n = count.sum().double()
    slope = invstd.double().square() * product.double() / n
    centred = g.double() - _facing(sum_g / n, x, 0.0)
    centred -= (x.double() - _facing(mean, x, 0.0)) * _facing(slope, x, 0.0)
    return (centred * _facing(invstd, x, 1.0) * _facing(weight, x, 1.0)).to(x.dtype)


OPERATORS = (
    batch_norm_stats,
    batch_norm_gather_stats_with_counts,
    batch_norm_elemt,
    batch_norm_backward_reduce,
    batch_norm_backward_elemt,
)
