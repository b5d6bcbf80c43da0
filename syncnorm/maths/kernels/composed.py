"""The kernels of a device that has none of its own: portable primitives and (C,)-sized operators.

The functions are those of `syncnorm.maths.kernels.triton`, which does each in one launch or two.
No number is read on the host.

    moments          x, w      -> [sum wx, sum wx^2, sum w]
    normalize        x, batch  -> y and, as rows of a (3, C) or (7, C) tensor, what it was made by
    update_running_  the running statistics follow a batch
    backward_sums    g, x      -> [sum g, sum g xhat], and the gradients of weight and bias
    backward_input   g, x      -> the gradient of x

A batch is [sum wx, sum wx^2, n] (`is_raw`) or [mean, m2, n], shape (2C+1,), float64. Rows are mean,
m2, invstd; where r and d correct towards running statistics also r, d, running mean and variance as
they were.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncnorm.maths.kernels import portable

Reference = tuple[Tensor, Tensor, Tensor, Tensor]
"""Running mean, running variance, r_max and d_max, for batch renormalisation."""


def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """Raw sums of one worker, shape (2C+1,), float64.

    The count is NaN where a weight is negative or not finite.
    """
    channels = x.shape[1]
    if x.numel() == 0:
        return torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
    if mask is None:
        count = torch.full((1,), x.numel() // channels, dtype=torch.float64, device=x.device)
        total = count
    else:
        is_valid = is_weight(mask)
        mask = torch.where(is_valid, mask, 0.0)
        total = mask.sum(dtype=torch.float64).view(1)
        count = torch.where(is_valid.all(), total, torch.nan)
    # About a pivot p near the mean, so that a large mean costs no digits of the variance.
    p, s1, s2 = portable.centred_sums(x, mask, total)
    sums = torch.addcmul(s1, p, total)
    return torch.cat([sums, torch.addcmul(s2, p, s1 + sums), count])


def is_weight(mask: Tensor) -> Tensor:
    """True where a mask is finite and >= 0."""
    return (mask >= 0) & mask.isfinite()


def normalize(
    x: Tensor,
    batch: Tensor,
    is_raw: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    reference: Reference | None,
) -> tuple[Tensor, Tensor]:
    """y = (x - mean) * invstd * weight + bias, corrected by r and d against a reference; and rows.

    y has the type and layout of x.
    """
    mean, m2, n = _finished(batch, is_raw)
    var = m2 * reciprocal(n)
    # One value, or none: the output is the bias, not a rounding error over sqrt(eps).
    invstd = torch.where((n <= 1) & (m2 == 0), 0.0, torch.rsqrt(var + eps))
    rows = [mean, m2, invstd]
    scale, shift = invstd, None
    if reference is not None:
        running_mean, running_var, r_max, d_max = reference
        sigma = torch.sqrt(running_var.double() + eps)
        r = torch.sqrt(var + eps) / sigma
        d = (mean - running_mean) / sigma
        r = torch.where(n == 0, 1.0, torch.minimum(torch.maximum(r, 1.0 / r_max), r_max))
        d = torch.where(n == 0, 0.0, torch.minimum(torch.maximum(d, -d_max), d_max))
        rows += [r, d, running_mean.double(), running_var.double()]
        scale, shift = r * invstd, d
    if weight is not None:
        scale = weight * scale
        shift = shift if shift is None else weight * shift
    if bias is not None:
        shift = bias.double() if shift is None else bias + shift
    packed = torch.stack(rows)
    if x.numel() == 0:
        return torch.empty_like(x), packed
    return portable.normalize(
        x, mean, scale, torch.zeros_like(mean) if shift is None else shift
    ), packed


def update_running_(
    running_mean: Tensor,
    running_var: Tensor,
    counter: Tensor | None,
    batch: Tensor,
    is_raw: bool,
    momentum: float | None,
    eps: float,
    is_std: bool,
) -> None:
    """running += factor * (that of the batch - running), in place.

    The factor is `momentum`, or 1 / counter after the batch is counted. With `is_std` the standard
    deviation follows the biased one, else the variance the unbiased. The variance keeps still where
    n <= 1, all where n = 0 or NaN.
    """
    mean, m2, n = _finished(batch, is_raw)
    if counter is not None:
        counter += n > 0
    factor = momentum
    if factor is None:
        assert counter is not None, "a cumulative average needs its counter"
        factor = 1.0 / counter.double().clamp(min=1.0)
    _blend_(running_mean, mean, factor, n > 0)
    if is_std:
        sigma = torch.sqrt(running_var.double() + eps)
        sigma = torch.lerp(sigma, torch.sqrt(m2 * reciprocal(n) + eps), _weight(factor, sigma))
        _blend_(running_var, (sigma.square() - eps).clamp(min=0.0), 1.0, n > 1)
    else:
        _blend_(running_var, m2 * reciprocal(n - 1.0), factor, n > 1)


def backward_sums(
    g: Tensor,
    x: Tensor,
    rows: Tensor,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[sum g, sum g xhat], shape (2, C), float64; the gradients of weight and bias, if any."""
    mean, _, invstd, *correction = rows.unbind()
    if x.numel() == 0:
        local = torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
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
    a, b = totals if n is None else totals * reciprocal(n)
    if mask is not None:
        mask = torch.where(is_weight(mask), mask, 0.0)
    scale = scale if weight is None else weight * scale
    return portable.backward_input(g, x, mean, scale, a, b * invstd, mask)


def reciprocal(n: Tensor) -> Tensor:
    """1 / n, and 0 where n = 0; NaN stays NaN."""
    return torch.where(n == 0, 0.0, 1.0 / n)


def _finished(batch: Tensor, is_raw: bool) -> tuple[Tensor, Tensor, Tensor]:
    """mean (C,), m2 (C,) and n ()."""
    channels = batch.numel() // 2
    first, second, n = batch.split((channels, channels, 1))
    n = n.squeeze(0)
    if not is_raw:
        return first, second, n
    mean = first * reciprocal(n)
    # In two steps: a fused multiply-add would not give 0 for a single value.
    return mean, (second - first * mean).clamp_(min=0.0), n


def _weight(factor: float | Tensor, like: Tensor) -> float | Tensor:
    return factor.to(like.dtype) if isinstance(factor, Tensor) else factor


def _blend_(running: Tensor, value: Tensor, factor: float | Tensor, where: Tensor) -> None:
    wide = running.double()
    running.copy_(torch.where(where, torch.lerp(wide, value, _weight(factor, wide)), wide))
