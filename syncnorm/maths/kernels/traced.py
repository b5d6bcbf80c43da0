"""The four primitives from plain tensor operators, as torch.compile traces them.

Inductor fuses each into one pass. Run one by one, the operators make temporaries of x's size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from syncnorm.maths.precision import sum_dtype
from syncnorm.maths.shapes import all_but_channels, facing

# So few that what is compiled for any number of samples from 2 on needs no second version.
_PIVOT_SAMPLES = 2
_PIVOT_ELEMENTS = 8


def _wide(x: Tensor) -> Tensor:
    """x in the type that the arithmetic is done in: at least float32."""
    return x if x.dtype == torch.float64 else x.float()


def _channels(t: Tensor, x: Tensor) -> Tensor:
    """A (C,) coefficient, shaped and typed to meet the wide x."""
    return facing(t.to(x.dtype), x)


def total(t: Tensor) -> Tensor:
    """The sum over all dimensions but the channels, shape (C,)."""
    return t.sum(all_but_channels(t), dtype=sum_dtype(t.device))


def centred_sums(
    x: Tensor, mask: Tensor | None, count: int | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A pivot p and the sums of w (x - p) and w (x - p)^2 about it; each (C,)."""
    if mask is None:
        some = _wide(x)
        some = some.flatten(2) if some.ndim > 2 else some.unsqueeze(-1)
        p = some[:_PIVOT_SAMPLES, :, :_PIVOT_ELEMENTS].mean((0, 2))
    else:
        p = weighted_mean(weighted_sum(x, mask), count).to(_wide(x).dtype)
    return p.to(sum_dtype(x.device)), *sums_about(p, x, mask)


def weighted_sum(x: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor] = total) -> Tensor:
    """Sum w x, shape (C,)."""
    return total(_wide(x) * mask)


def weighted_mean(weighted: Tensor, count: int | Tensor) -> Tensor:
    """The pivot under a mask: elements of weight 0 may lie anywhere; 0 where there is no weight."""
    return (weighted / count).nan_to_num(0.0, 0.0, 0.0)


def sums_about(
    p: Tensor, x: Tensor, mask: Tensor | None, total: Callable[[Tensor], Tensor] = total
) -> tuple[Tensor, Tensor]:
    """Sums of w (x - p) and w (x - p)^2, each (C,)."""
    wide = _wide(x)
    b = wide - _channels(p, wide)
    wb = b if mask is None else b * mask.to(wide.dtype)
    return total(wb), total(wb * b)


def normalize(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(x - mean) * scale + shift, in the type and layout of x."""
    wide = _wide(x)
    y = (wide - _channels(mean, wide)) * _channels(scale, wide) + _channels(shift, wide)
    # Not `to` without need, which returns y itself: for an output of that kind torch 2.11 compiles
    # a gradient of zeros.
    return y if y.dtype == x.dtype else y.to(x.dtype)


def backward_sums(
    grad_output: Tensor, x: Tensor, mean: Tensor, total: Callable[[Tensor], Tensor] = total
) -> Tensor:
    """[sum g (C), sum g (x - mean) (C)], shape (2C,)."""
    g, wide = _wide(grad_output), _wide(x)
    products = g * (wide - _channels(mean, wide))
    return torch.cat([total(t) for t in (g, products)])


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
    g, wide = _wide(grad_output), _wide(x)
    t = _channels(a, wide) + _channels(b, wide) * (wide - _channels(mean, wide))
    if mask is not None:
        t = t * mask.to(wide.dtype)
    # The first operand decides the layout of the result: t has that of x, g may not.
    return ((t - g) * _channels(-scale, wide)).to(x.dtype)
