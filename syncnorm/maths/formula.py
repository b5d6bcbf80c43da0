"""Batch normalisation of one rank in operators that torch differentiates, batches and traces.

    n = sum w        mean = sum w x / n        var = sum w (x - mean)^2 / n
    s = 1 / sqrt(var + eps)

    y  = (x - mean) * s * weight + bias
    dx = weight * s * (g - w * (sum g + xhat * sum g xhat) / n)        xhat = (x - mean) * s

In the type of sums and out of place, with no number read: slower than the kernels, and more is kept for a
backward pass. Shapes: x, g (N, C, *S); mask (N, 1, *S) or None; all else (C,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncnorm.maths.precision import for_sums, rounding, sum_dtype
from syncnorm.maths.shapes import all_but_channels, facing


def raw_sums(x: Tensor, mask: Tensor | None) -> Tensor:
    """[sum wx, sum wx^2, sum w], shape (2C+1,)."""
    wide, w = for_sums(x), _weights(x, mask)
    wx = w * wide
    return torch.cat(
        [wx.sum(all_but_channels(x)), (wx * wide).sum(all_but_channels(x)), w.sum().view(1)]
    )


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, eps: float
) -> Tensor:
    """y, in the type of x; the moments are functions of x."""
    centred, _, var, is_single = _moments(x, mask)
    s = _invstd(var + eps, is_single)
    y = centred * facing(s if weight is None else s * weight, x)
    return (y if bias is None else y + facing(for_sums(bias), x)).to(x.dtype)


def gradient(
    g: Tensor, x: Tensor, weight: Tensor | None, mask: Tensor | None, invstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, in the type of x, sum g xhat and sum g; all functions of g, x and weight.

    `invstd` is what x had.
    """
    centred, inverse, var, is_single = _moments(x, mask)
    # The constant between the variance and 1 / invstd^2. It is infinite where invstd is 0.
    eps = (invstd.pow(-2) - var).detach()
    s = _invstd(var + eps, is_single)
    xhat, wide = centred * facing(s, x), for_sums(g)
    sum_g, sum_g_xhat = wide.sum(all_but_channels(x)), (wide * xhat).sum(all_but_channels(x))
    through = _weights(x, mask) * (
        facing(sum_g * inverse, x) + xhat * facing(sum_g_xhat * inverse, x)
    )
    dx = (wide - through) * facing(s if weight is None else s * weight, x)
    return dx.to(x.dtype), sum_g_xhat, sum_g


def _moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x - mean; 1 / n, and 0 where n = 0; var; whether no value or a single one counts."""
    wide, w = for_sums(x), _weights(x, mask)
    count = w.sum()
    inverse = torch.where(count == 0, 0.0, 1.0 / count)
    mean = (w * wide).sum(all_but_channels(x)) * inverse
    centred = wide - facing(mean, x)
    var = (w * centred.square()).sum(all_but_channels(x)) * inverse
    # The mean of a single value is rounded, where its weight is no whole number.
    error = (rounding(mean.dtype) * mean).square()
    return centred, inverse, var, (count <= 1) & (var <= error)


def _invstd(var: Tensor, is_single: Tensor) -> Tensor:
    return torch.where(is_single, 0.0, torch.rsqrt(var))


def _weights(x: Tensor, mask: Tensor | None) -> Tensor:
    # Made from x rather than from its sizes, which a tracer would take for constants.
    if mask is not None:
        return for_sums(mask)
    return torch.ones_like(x[:, :1], dtype=sum_dtype(x.device))
