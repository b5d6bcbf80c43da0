"""The four primitives as operators that run one by one, on a device without kernels of its own.

On CUDA these read x once and take half types as they are: reductions that add up in float32, and
torch's batch norm in evaluation mode, with an eps of 0: it is in the variance, or the variance is 1
and all is in the coefficients. The sums of its backward pass are its gradients of weight
and bias, sum g (x - mean) / std and sum g. On other devices the traced kernels run on slices of x,
so that their temporaries are small.

A channel is summed in short runs in float32, and the runs are added in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from syncnorm.device import is_host
from syncnorm.maths.kernels import layout, traced
from syncnorm.maths.precision import HALF_TYPES, sum_dtype
from syncnorm.maths.shapes import all_but_channels, facing

# Where batch norm takes half types with float32 coefficients. "meta" stands for CUDA.
_HAVE_OPERATORS = ("cuda", "meta", "cpu")
_PIVOT_SAMPLES = 8
# A run has at most about so many values: in planes, and in rows, which the operator of a CPU adds
# one by one.
_RUN, _RUN_ROWS = 1024, 256
# A slice has at least so many elements. A tensor is cut into so many slices that temporaries are
# no larger than it is: few for two of them, more for the traced kernels.
_SLICE = 1 << 18
_FEW, _SLICES, _MANY = 4, 16, 256

_forward_operator = torch.ops.aten.native_batch_norm.out
_backward_operator = torch.ops.aten.native_batch_norm_backward.default
_SUMS_ONLY = [False, True, True]


def raw_sums(x: Tensor, mask: Tensor | None, count: Tensor | None) -> Tensor:
    """[sum w x, sum w x^2, sum w], shape (2C+1,).

    Args:
        x: not empty.
        mask: weights, (N, 1, *S), or None.
        count: their sum, shape (1,); None without a mask.
    """
    wide, number = sum_dtype(x.device), x.numel() // x.shape[1]
    if mask is not None or x.device.type not in _HAVE_OPERATORS:
        if count is None:
            count = torch.full((1,), number, dtype=wide, device=x.device)
        # About a pivot p near the mean, so that a large mean costs no digits of the variance.
        p, s1, s2 = _sums_about_a_pivot(x, mask, count)
        sums = torch.addcmul(s1, p, count)
        return torch.cat([sums, torch.addcmul(s2, p, s1 + sums), count])
    pivot = None if x.dtype in HALF_TYPES else _pivot(x)
    runs, dims, size = _runs(x if pivot is None else x - facing(pivot, x))
    # Of each run its sum, or its mean less the pivot, and its variance: float32 has no room for
    # the square of all that it has room for, summed.
    if pivot is None:
        # The sums of a run are all but exact in float32.
        first = runs.sum(dims, dtype=torch.float32)
        var = torch.var(runs, dims, correction=0, out=torch.empty_like(first))
    else:
        var, first = torch.var_mean(runs, dims, correction=0)
    groups, channels, pieces = var.shape
    # [sum x, mean x^2, size] of each run, or [mean x, mean x^2, 1]. The last is there already.
    last = size if pivot is None else 1
    of_runs = var.new_full((groups, 2 * channels + 1, pieces), last, dtype=wide)
    firsts, squares, ones = of_runs.split((channels, channels, 1), dim=1)
    if pivot is None:
        firsts.copy_(first)
    else:
        torch.addcmul(first, ones, pivot.view(-1, 1), out=firsts)
    torch.addcmul(var, firsts, firsts, value=last**-2, out=squares)
    sums = of_runs.sum((0, 2))
    (sums[channels:-1] if pivot is None else sums).mul_(size)
    return sums


def normalize(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(x - mean) * scale + shift, in the type and layout of x."""
    if x.device.type in _HAVE_OPERATORS:
        mean, scale, shift = (c.to(arithmetic_dtype(x)) for c in (mean, scale, shift))
        return _batch_norm(x, mean, torch.ones_like(mean), scale, shift)
    y = torch.empty_like(x)
    for out, part in _slices(y, x):
        out.copy_(traced.normalize(part, mean, scale, shift))
    return y


def batch_norm(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(x - mean) / sqrt(var) * weight + bias, in the type and layout of x.

    The others have the type of `arithmetic_dtype`.
    """
    if x.device.type in _HAVE_OPERATORS:
        return _batch_norm(x, mean, var, weight, bias)
    return normalize(x, mean, weight * var.rsqrt(), bias)


def backward_sums(grad_output: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """[sum g (C), sum g (x - mean) (C)], shape (2C,)."""
    return standardised_sums(grad_output, x, torch.stack([mean, torch.ones_like(mean)])).view(-1)


def standardised_sums(grad_output: Tensor, x: Tensor, by: Tensor) -> Tensor:
    """[sum g, sum g (x - mean) * invstd], shape (2, C), `by` [mean, invstd], shape (2, C)."""
    is_rows, channels = layout.is_rows(x), x.shape[1]
    # (samples in a run, groups * channels * pieces, values of a piece), the last not in rows: each
    # channel that the operator sees is a run.
    number, length = (x.numel() // channels, 1) if is_rows else (len(x), x.shape[2:].numel())
    most = _RUN_ROWS if is_rows else _RUN
    piece = _divisor(length, most)
    samples = _divisor(number, max(1, most // piece))
    if x.device.type not in _HAVE_OPERATORS or samples * piece > 2 * most:
        parts = _slices(x, grad_output)
        sums = _add(traced.backward_sums(g, part, by[0], _total) for part, g in parts).view(2, -1)
        sums[1].mul_(by[1])
        return sums
    runs = (number // samples, channels, length // piece)
    shape = (samples, math.prod(runs), *([] if is_rows else [piece]))
    x = layout.dense(x)
    g, v = (layout.flat(t).view(shape) for t in (layout.like(grad_output, x), x))
    coefficients = torch.empty(2, *runs, dtype=arithmetic_dtype(x), device=x.device)
    coefficients.copy_(by.view(2, 1, -1, 1))
    # In training mode the operator takes the mean and 1 / std of the batch as they are given.
    mean, invstd = coefficients.view(2, -1)
    _, products, total = _backward_operator(
        g, v, invstd, None, None, mean, invstd, True, 0.0, _SUMS_ONLY
    )
    sums = torch.cat([total, products], out=by.new_empty(2 * len(mean)))
    return sums.view(2, *runs).sum((1, 3))


def backward_input(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    a: Tensor,
    b: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """scale * (g - w * (a + b * (x - mean))), in the type and layout of x."""
    minus = -scale
    return combine(grad_output, x, mean, scale, a * minus, b * minus, mask)


def combine(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    slope: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """scale * g + w * (shift + slope * (x - mean)), in the type and layout of x."""
    dtype = arithmetic_dtype(x)
    mask = None if mask is None else mask.to(dtype)
    scale, shift, slope = (c.to(dtype) for c in (scale, shift, slope))
    factor = facing(scale, x)
    if x.device.type not in _HAVE_OPERATORS:
        result = torch.empty_like(x)
        for out, part, g, w in _slices(result, x, grad_output, mask):
            t = traced.normalize(part.to(dtype), mean, slope, shift)
            out.copy_(torch.addcmul(t if w is None else t * w, g, factor))
        return result
    if x.dtype not in HALF_TYPES:
        result = _batch_norm(x, mean.to(dtype), torch.ones_like(slope), slope, shift)
        if mask is not None:
            result *= mask
        return result.addcmul_(grad_output, factor)
    # With the rounded slope, so that a large mean is taken off exactly.
    shift = torch.addcmul(shift, slope, mean, value=-1, out=torch.empty_like(shift))
    slope, shift = facing(slope, x), facing(shift, x)
    result = torch.empty_like(x)
    # Two slices: a float32 one is as large as x. On a CPU launches cost nothing, and memory does.
    most = _MANY if is_host(x) else 2
    for out, part, g, w in _slices(result, x, grad_output, mask, most=most):
        t = torch.addcmul(shift, part, slope)
        if w is not None:
            t *= w
        if is_host(x):  # to write another type than the operands' is slow there
            out.copy_(t.addcmul_(g, factor))
        else:
            torch.addcmul(t, g, factor, out=out)
        del t
    return result


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """The type of the coefficients that x meets: at least float32."""
    return torch.float32 if x.dtype in HALF_TYPES else x.dtype


def _batch_norm(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`batch_norm` by torch's operator, in evaluation mode."""
    # CUDA writes the mean and the inverse of the deviation, and normalises by what it has written.
    y, saved = torch.empty_like(x), torch.empty(2, len(mean), dtype=mean.dtype, device=mean.device)
    _forward_operator(
        x, weight, bias, mean, var, False, 0.0, 0.0,
        out=y, save_mean=saved[0], save_invstd=saved[1],
    )  # fmt: skip
    return y


def _pivot(x: Tensor) -> Tensor:
    """The mean of some elements of each channel, shape (C,), spread over the batch.

    A single element may be an outlier. Their number is a power of two, so that the pivot of
    integers is exact.
    """
    index = [slice(None)] * x.ndim
    for dim in all_but_channels(x):
        size = x.shape[dim]
        number = min(_PIVOT_SAMPLES if dim == 0 else 2, 1 << (size.bit_length() - 1))
        index[dim] = slice(0, size // number * number, size // number)
    return x[tuple(index)].mean(all_but_channels(x), dtype=arithmetic_dtype(x))


def _runs(x: Tensor) -> tuple[Tensor, list[int], int]:
    """A view of x with the runs of each channel apart, their dimensions, and the size of a run.

    Strides may be any. The sums have the shape (groups of samples, C, pieces of a sample).
    """
    height, row = (1, 1) if x.ndim == 2 else (x.shape[2], x.shape[3:].numel())
    piece = _divisor(height, max(1, _RUN // row))
    samples = _divisor(x.shape[0], max(1, _RUN // (piece * row)))
    v = x.unflatten(0, (samples, -1))
    v = v.unsqueeze(3) if x.ndim == 2 else v.unflatten(3, (-1, piece))
    return v, [0, *range(4, v.ndim)], samples * piece * row


@functools.lru_cache(maxsize=1024)
def _divisor(n: int, limit: int) -> int:
    """The largest divisor of n up to the limit, or the next if that is far below."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    divisors = sorted({*low, *(n // d for d in low)})
    best = max(d for d in divisors if d <= limit)
    return best if best == n or 16 * best >= limit else min(d for d in divisors if d > limit)


def _total(t: Tensor) -> Tensor:
    """The sum over all dimensions but the channels, shape (C,)."""
    runs, dims, _ = _runs(t)
    return runs.sum(dims).to(sum_dtype(t.device)).sum((0, 2))


def _add(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def _slices(x: Tensor, *others: Tensor | None, most: int = _SLICES) -> Iterator[tuple[Tensor, ...]]:
    """The same parts of an (N, C, *S) tensor and of those that go with it, none of them copied."""
    number = max(1, min(most, x.numel() // _SLICE))
    # Samples lie together, which a CPU's caches like; elsewhere slices are as small as can be.
    dims = [0] if is_host(x) else [d for d in range(x.ndim) if d != 1]
    dim = min(dims, key=lambda d: -(-x.shape[d] // number) / max(1, x.shape[d]))
    parts = x.chunk(number, dim)
    rest = ([None] * len(parts) if t is None else t.chunk(number, dim) for t in others)
    return zip(parts, *rest, strict=True)  # pyright: ignore[reportReturnType]


def _sums_about_a_pivot(
    x: Tensor, mask: Tensor | None, count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A pivot p and the sums of w (x - p) and w (x - p)^2 about it; each (C,)."""
    wide = sum_dtype(x.device)
    if x.device.type not in _HAVE_OPERATORS:
        if mask is None:
            p = _pivot(x)
        else:
            weighted = _add(traced.weighted_sum(part, w, _total) for part, w in _slices(x, mask))
            p = traced.weighted_mean(weighted, count).to(arithmetic_dtype(x))
        sums = (traced.sums_about(p, part, w, _total) for part, w in _slices(x, mask))
        s1, s2 = _add(torch.stack(each) for each in sums)
        return p.to(wide), s1, s2
    assert mask is not None
    mask = mask.to(arithmetic_dtype(x))
    # Elements of weight 0 may lie anywhere, so the pivot is the (rounded) weighted mean itself.
    weighted = _add(_total(part * w) for part, w in _slices(x, mask, most=_FEW))
    p = traced.weighted_mean(weighted, count).to(mask.dtype)
    zero, parts = torch.zeros_like(p, dtype=wide), []
    for part, w in _slices(x, mask, most=_FEW):
        b = part - facing(p, x)
        parts.append(backward_sums(b * w, b, zero))
        del b
    s1, s2 = _add(parts).view(2, -1)
    return p.to(wide), s1, s2
