"""The four primitives on a CPU, from ATen's vectorised batch-norm operators.

`native_batch_norm_backward` in evaluation mode returns sum g and sum g (x - running_mean) / std in
one vectorised pass, which a general reduction does not (var_mean takes 20 times as long). It sums
in float32, so it is given blocks that fit in the cache, with both factors centred, and the blocks
are added in float64. With g = w (x - p) and running_mean = p it yields the centred raw sums. The
squares of a block must stay below 3e38: deviations of 1e17 do.
The other three are those of `portable`, which knows these operators, too.

The running variance is always passed as 1 and eps as 0: standard deviations are folded into the
(C,)-sized coefficients, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncnorm.maths.kernels import layout, portable
from syncnorm.maths.precision import HALF_TYPES
from syncnorm.maths.shapes import facing

# The type that the arithmetic is done in: at least float32.
_WIDE = dict.fromkeys((*HALF_TYPES, torch.float32), torch.float32) | {torch.float64: torch.float64}
# sqrt(1/2), exact in float32.
_SCATTER = 11_863_283 / 2**24
_PIVOT_ELEMENTS = 8
_SHORT_PLANE = 8
# The mean times a slope, where multiplying out begins to cost a digit.
_FAR = 16.0

_backward_operator = torch.ops.aten.native_batch_norm_backward.default
_SUMS_ONLY = [False, True, True]


def centred_sums(
    x: Tensor, mask: Tensor | None, count: int | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A pivot p and the sums of w (x - p) and w (x - p)^2 about it; each (C,), float64."""
    v = _summable(x)
    if mask is None:
        p = _pivot(v)
        return p.double(), *_sums_about(v, None, p)
    # Elements of weight 0 may lie anywhere, so under a mask the pivot is the (rounded) weighted
    # mean itself.
    w = layout.view(mask.to(_WIDE[x.dtype]), rows=v.ndim == 2)
    total, _ = _sums_about(v, w, w.new_zeros(x.shape[1]))
    p = (total / count).nan_to_num(0.0, 0.0, 0.0).to(w.dtype)
    return p.double(), *_sums_about(v, w, p)


def _summable(x: Tensor) -> Tensor:
    """The view to take sums over.

    Planes of a few elements are copied into rows: the operator is slow on them.
    """
    v = layout.flat(x)
    if v.ndim == 3 and v.shape[2] <= _SHORT_PLANE < v.shape[1]:
        return v.transpose(1, 2).reshape(-1, v.shape[1])
    return v


def _pivot(v: Tensor) -> Tensor:
    """The mean of up to 8 elements of each channel, shape (C,), spread over the batch.

    A single element may be an outlier. Their number is a power of two, so that the pivot of
    integers is exact.
    """
    some = _spread(v, 0, _PIVOT_ELEMENTS)
    if v.ndim == 2:
        return some.to(_WIDE[v.dtype]).mean(0)
    return _spread(some, 2, _PIVOT_ELEMENTS // some.shape[0]).to(_WIDE[v.dtype]).mean((0, 2))


def _spread(v: Tensor, dim: int, most: int) -> Tensor:
    """2^k <= most evenly spaced slices of v along a dimension."""
    number = min(most, 1 << (v.shape[dim].bit_length() - 1))
    index = [slice(None)] * v.ndim
    step = v.shape[dim] // number
    index[dim] = slice(0, number * step, step)
    return v[tuple(index)]


def _sums_about(v: Tensor, w: Tensor | None, p: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of w (x - p) and w (x - p)^2, each (C,), float64.

    Values of a half type lie on so coarse a grid that float32 rounds each addition the same way,
    and a long sum drifts. Times an odd factor their last bits are scattered, and the roundings
    cancel.
    """
    is_half = v.dtype in HALF_TYPES
    cut = layout.Cut.of(v)
    xs = cut.blocks(v)
    ws = [None] * len(xs) if w is None else cut.blocks(w)
    products = _Products(cut, p, len(xs))
    for x, weights, centre in zip(xs, ws, cut.coefficients(facing(p, v), len(xs)), strict=True):
        wide = x.to(p.dtype)
        b = wide - centre
        if is_half:
            b *= _SCATTER
        products.add(b if weights is None else b.mul_(weights), wide)
    total, squares = products.totals()
    return (total / _SCATTER, squares / _SCATTER) if is_half else (total, squares)


class _Products:
    """Sums of g and of g (x - mean), block by block."""

    def __init__(self, cut: layout.Cut, mean: Tensor, blocks: int) -> None:
        self._cut = cut
        one, zero = torch.ones_like(mean), torch.zeros_like(mean)
        self._coefficients = iter(cut.columns([one, mean, zero], blocks))
        self._sums: list[Tensor] = []
        self._products: list[Tensor] = []

    def add(self, g: Tensor, x: Tensor) -> None:
        one, mean, zero = next(self._coefficients)
        _, products, total = _backward_operator(
            g, x, one, mean, one, zero, one, False, 0.0, _SUMS_ONLY
        )
        self._sums.append(total)
        self._products.append(products)

    def totals(self) -> tuple[Tensor, Tensor]:
        return self._cut.total(self._sums), self._cut.total(self._products)


def normalize(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(x - mean) * scale + shift, in the type and layout of x."""
    return portable.normalize(*_centred_if_far(x, mean, scale), scale, shift)


def _centred_if_far(x: Tensor, mean: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """An x and a mean with the same differences; x less the mean, and 0, if that is far from 0.

    The operator computes x * slope + (shift - mean * slope), which then costs digits.
    """
    if x.dtype != torch.float32 or not ((mean * slope).abs() > _FAR).any():
        return x, mean
    return x - facing(mean.float(), x), torch.zeros_like(mean)


def backward_sums(grad_output: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """[sum g (C), sum g (x - mean) (C)], shape (2C,), float64."""
    return portable.backward_sums(grad_output, x, mean)


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
    x, mean = _centred_if_far(x, mean, scale * b)
    return portable.backward_input(grad_output, x, mean, scale, a, b, mask)
