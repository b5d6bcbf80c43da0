"""The kernels of a device that has none of its own: portable primitives and (C,)-sized operators.

These are functions of `syncnorm.maths.kernels.triton`, too, which does each in one launch or two.
No number is read on the host.

    moments         x, w      -> [sum wx, sum wx^2, sum w]
    normalize       x, batch  -> y, and rows: what it was made by
    backward_sums   g, x      -> [sum g, sum g xhat], and the gradients of weight and bias
    backward_input  g, x      -> the gradient of x

Rows are a (3, C) tensor of mean, m2 and invstd; where r and d correct towards running statistics a
(9, C) tensor, with r, d, running mean and variance as they were, r_max and d_max.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncnorm.maths.kernels import portable
from syncnorm.maths.kernels.batch import Batch, Reference, Scheduled
from syncnorm.maths.precision import sum_dtype


@torch.no_grad()
def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """Raw sums of one worker, shape (2C+1,).

    The count is NaN where a weight is negative or not finite.
    """
    channels, wide = x.shape[1], sum_dtype(x.device)
    if x.numel() == 0:
        return torch.zeros(2 * channels + 1, dtype=wide, device=x.device)
    if mask is None:
        total = count = torch.full((1,), x.numel() // channels, dtype=wide, device=x.device)
    else:
        is_valid = is_weight(mask)
        mask = torch.where(is_valid, mask, 0.0)
        total = mask.sum(dtype=wide).view(1)
        count = total.masked_fill(~is_valid.all(), torch.nan)
    # About a pivot p near the mean, so that a large mean costs no digits of the variance.
    p, s1, s2 = portable.centred_sums(x, mask, total)
    sums = torch.addcmul(s1, p, total)
    return torch.cat([sums, torch.addcmul(s2, p, s1 + sums), count])


def is_weight(mask: Tensor) -> Tensor:
    """True where a mask is finite and >= 0."""
    return (mask >= 0) & mask.isfinite()


def normalize(
    x: Tensor,
    batch: Batch,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    reference: Reference | None,
) -> tuple[Tensor, Tensor]:
    """y = (x - mean) * invstd * weight + bias, corrected by r and d against a reference; and rows.

    y has the type and layout of x.
    """
    mean, wide = batch.mean, batch.mean.dtype
    invstd = batch.invstd(eps)
    rows = [mean, batch.m2, invstd]
    scale, shift = invstd, None
    if reference is not None:
        *before, bounds = reference
        if isinstance(bounds, Scheduled):
            bounds = bounds.schedule(bounds.step)
        running_mean, running_var, r_max, d_max = (t.to(wide) for t in (*before, *bounds))
        sigma = torch.sqrt(running_var + eps)
        r = torch.sqrt(batch.var + eps) / sigma
        d = (mean - running_mean) / sigma
        is_empty = batch.count == 0
        r = r.clamp(1.0 / r_max, r_max).masked_fill(is_empty, 1.0)
        d = d.clamp(-d_max, d_max).masked_fill(is_empty, 0.0)
        rows += [r, d, running_mean, running_var, r_max.expand_as(r), d_max.expand_as(d)]
        scale, shift = r * invstd, d
    if weight is not None:
        scale = weight * scale
        shift = shift if shift is None else weight * shift
    if bias is not None:
        shift = bias.to(wide) if shift is None else bias + shift
    packed = torch.stack(rows)
    if x.numel() == 0:
        return torch.empty_like(x), packed
    shift = torch.zeros_like(mean) if shift is None else shift
    return portable.normalize(x, mean, scale, shift), packed


def backward_sums(
    g: Tensor,
    x: Tensor,
    rows: Tensor,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[sum g, sum g xhat], shape (2, C); the gradients of weight and bias, if any."""
    mean, _, invstd, *correction = rows.unbind()
    if x.numel() == 0:
        local = torch.zeros_like(rows[:2])
    else:
        local = portable.backward_sums(g, x, mean).view(2, -1)
        local[1] *= invstd
    sum_g, sum_g_xhat = local
    if correction:
        r, d, *_ = correction
        sum_g_xhat = r * sum_g_xhat + d * sum_g
    return (
        local,
        None if weight_dtype is None else sum_g_xhat.to(weight_dtype, copy=True),
        None if bias_dtype is None else sum_g.to(bias_dtype, copy=True),
    )


def backward_input(
    g: Tensor,
    x: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    totals: Tensor,
    n: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """weight * r * invstd * (g - w * (A + xhat * B)), in the type and layout of x.

    A and B are `totals` / n, or `totals` themselves where n is None.
    """
    if x.numel() == 0:
        return torch.empty_like(x)
    mean, _, invstd, *correction = rows.unbind()
    scale = correction[0] * invstd if correction else invstd
    scale = scale if weight is None else weight * scale
    a, b = totals if n is None else totals * torch.where(n == 0, n, n.reciprocal())
    if mask is not None:
        mask = torch.where(is_weight(mask), mask, 0.0)
    return portable.backward_input(g, x, mean, scale, a, b * invstd, mask)
