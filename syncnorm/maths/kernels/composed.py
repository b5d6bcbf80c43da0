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
from syncnorm.maths.kernels.arguments import Reference, Scheduled
from syncnorm.maths.moments import Moments
from syncnorm.maths.precision import rounding, sum_dtype

# Less than any sum of weights, and lost in one; its reciprocal is finite in float32.
_NOTHING = 1e-30


@torch.no_grad()
def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """Raw sums of one worker, shape (2C+1,).

    The count is NaN where a weight is negative or not finite.
    """
    wide = sum_dtype(x.device)
    if x.numel() == 0:
        return torch.zeros(2 * x.shape[1] + 1, dtype=wide, device=x.device)
    if mask is None:
        return portable.raw_sums(x, None, None)
    is_valid = is_weight(mask)
    mask = torch.where(is_valid, mask, 0.0)
    sums = portable.raw_sums(x, mask, mask.sum(dtype=wide).view(1))
    sums[-1].masked_fill_(~is_valid.all(), torch.nan)
    return sums


def is_weight(mask: Tensor) -> Tensor:
    """True where a mask is finite and >= 0."""
    return (mask >= 0) & mask.isfinite()


def normalize(
    x: Tensor,
    batch: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    reference: Reference | None,
) -> tuple[Tensor, Tensor]:
    """y = (x - mean) * invstd * weight + bias, corrected by r and d against a reference; and rows.

    y has the type and layout of x.
    """
    rows, mean, var, *correction = _finished(batch, eps, reference)
    if x.numel() == 0:
        var.rsqrt_()  # in the row of invstd
        return torch.empty_like(x), rows
    dtype = portable.arithmetic_dtype(x)
    # As they meet x.
    met_mean, met_var = rows[:3:2].to(dtype, copy=True)
    invstd = var.rsqrt_()
    weight = torch.ones_like(met_mean) if weight is None else weight.to(dtype)
    bias = torch.zeros_like(met_mean) if bias is None else bias.to(dtype)
    if correction:
        r, d, *_ = correction
        bias = torch.addcmul(bias, weight, d, out=torch.empty_like(bias))
        weight = _product(weight, r, dtype)
    if x.dtype == torch.float32:
        # See `kernels._rounded`.
        lost = torch.sub(met_mean, mean).mul_(invstd)
        bias = torch.addcmul(bias, weight, lost, out=torch.empty_like(bias))
    return portable.batch_norm(x, met_mean, met_var, weight, bias), rows


def _finished(batch: Moments, eps: float, reference: Reference | None) -> tuple[Tensor, ...]:
    """Finish a statistic in rows, but for the last root: mean, m2, var + eps, r, d and what they refer to.

    Returns:
        The rows in one tensor; mean; var + eps, in the row of invstd, infinite where that is 0; and
        with a reference r, d and the rows behind them.
    """
    packed, is_raw = batch.packed
    channels = packed.numel() // 2
    n = packed[-1]
    positive = n if batch.has_several else _positive(n)
    rows = packed.new_empty(3 if reference is None else 9, channels)
    mean, m2, invstd, *correction = rows.unbind()
    if is_raw:
        total, squares = packed[:-1].view(2, -1)
        torch.div(total, positive, out=mean)
        # Each rounded by itself, so that a single value leaves 0.
        torch.mul(total, mean, out=m2)
        torch.sub(squares, m2, out=m2).clamp_(min=0)
    else:
        rows[:2] = packed[:-1].view(2, -1)
    var = torch.div(m2, positive, out=invstd).add_(eps)
    if reference is not None:
        _correct(rows, var, n, eps, reference)
    if not batch.has_several:
        # No value, or a single one: y is the bias, and the gradient 0.
        is_single = m2 <= (rounding(m2.dtype) * packed[channels:-1] if is_raw else 0)
        var.masked_fill_(is_single.logical_and_(n <= 1), torch.inf)
        m2.masked_fill_(is_single, 0)
    return rows, mean, var, *correction


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a * b, which has the shape of b, computed in the wider type and rounded to `dtype`."""
    return torch.mul(a, b, out=b.new_empty(b.shape, dtype=dtype))


def _positive(n: Tensor) -> Tensor:
    """The least positive number in place of 0, so that what is counted over nothing is 0."""
    return n.clamp(min=torch.finfo(n.dtype).tiny)


def _correct(rows: Tensor, var: Tensor, n: Tensor, eps: float, reference: Reference) -> None:
    """Write r, d and what they refer to: running mean and variance, r_max and d_max.

    `var` has eps added.
    """
    bounds = reference.bounds
    if isinstance(bounds, Scheduled):
        bounds = bounds.schedule(bounds.step)
    mean, _, _, r, d, running_mean, running_var, r_max, d_max = rows.unbind()
    _copy_each([running_mean, running_var], [reference.running_mean, reference.running_var])
    for row, bound in zip((r_max, d_max), bounds, strict=True):
        row.copy_(bound)
    torch.sqrt(var, out=r)
    torch.sub(mean, running_mean, out=d)
    rows[3:5].div_(torch.sqrt(running_var + eps))
    is_empty = n == 0
    torch.clamp(r, r_max.reciprocal(), r_max, out=r).masked_fill_(is_empty, 1.0)
    torch.clamp(d, -d_max, d_max, out=d).masked_fill_(is_empty, 0.0)


def _copy_each(to: list[Tensor], given: list[Tensor]) -> None:
    """Copy one list of tensors to another, whatever their types, in one launch."""
    torch._foreach_copy_(to, given)  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def update_running_(
    running_mean: Tensor,
    running_var: Tensor,
    counter: Tensor | None,
    batch: Moments,
    momentum: float | None,
    eps: float,
    is_std: bool,
) -> None:
    """Count the batch and have the running statistics follow it, in place.

    See `syncnorm.maths.moments` for what a batch of one value or none changes.
    """
    mean, m2, n = batch.mean, batch.m2, batch.count.view(1)
    running = [running_mean, running_var]
    # The mean moves where n > 0, the variance where n > 1, neither where n is NaN.
    moves = n > (0 if batch.has_several else torch.arange(2, dtype=n.dtype, device=n.device))
    if counter is not None:
        counter += moves[0]
    factor: float | Tensor | None = momentum
    if factor is None:
        assert counter is not None, "a cumulative average needs its counter"
        factor = 1.0 / counter.to(n.dtype).clamp(min=1.0)
    old = mean.new_empty(2, len(mean))
    _copy_each(list(old), running)
    if is_std:
        sigma, of_batch = torch.sqrt(old[1] + eps), torch.sqrt(m2 / _positive(n) + eps)
        var = torch.lerp(sigma, of_batch, factor).square_().sub_(eps).clamp_(min=0)
        new = torch.stack([torch.lerp(old[0], mean, factor), var])
    else:
        new = torch.lerp(old, torch.stack([mean, m2 / (n - 1)]), factor)
    _copy_each(running, list(torch.where(moves.view(-1, 1), new, old)))


def backward_sums(
    g: Tensor,
    x: Tensor,
    rows: Tensor,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[sum g, sum g xhat], shape (2, C); the gradients of weight and bias, if any."""
    mean_and_invstd = rows[:3:2]
    local = (
        torch.zeros_like(mean_and_invstd)
        if x.numel() == 0
        else portable.standardised_sums(g, x, mean_and_invstd)
    )
    of_affine = local
    if len(rows) > 3:
        r, d = rows[3:5]
        of_affine = torch.stack([local[0], torch.addcmul(r * local[1], d, local[0])])
    if weight_dtype is not None and weight_dtype == bias_dtype:
        both = of_affine.to(weight_dtype, copy=True)
        return local, both[1], both[0]
    return (
        local,
        None if weight_dtype is None else of_affine[1].to(weight_dtype, copy=True),
        None if bias_dtype is None else of_affine[0].to(bias_dtype, copy=True),
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
    dtype = portable.arithmetic_dtype(x)
    scale = correction[0] * invstd if correction else invstd
    scale = scale.to(dtype) if weight is None else _product(weight, scale, dtype)
    # [-A, -B]. Over nothing the sums are not 0, since weights of 0 leave out x, but not g; there
    # the scale is 0, and what it is multiplied by is finite.
    minus = totals.neg() if n is None else totals / (_NOTHING - n)
    minus[1].mul_(invstd)
    shift, slope = _product(scale, minus, dtype)
    if mask is not None:
        mask = torch.where(is_weight(mask), mask, 0.0)
    return portable.combine(g, x, mean, scale, shift, slope, mask)


def add_identity(message: Tensor, size: int, identity: int) -> Tensor:
    """[message, identity, identity, ...], shape (size,), float64."""
    tail = message.new_full((size - message.numel(),), identity)
    return torch.cat([message.reshape(-1), tail])


def compare_identity_(wire: Tensor, count: int, identity: int) -> None:
    """Write NaN over the first `count` numbers of a sum if the last is no multiple of `identity`."""
    wire[:count].masked_fill_(torch.remainder(wire[-1], identity) != 0, torch.nan)
