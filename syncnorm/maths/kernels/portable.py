"""The four primitives from plain tensor operators: every device, traceable by torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

_PIVOT_ELEMENTS = 8


def _wide(x: Tensor) -> Tensor:
    """x in the type that the arithmetic is done in: at least float32."""
    return x if x.dtype == torch.float64 else x.float()


def _over(x: Tensor) -> list[int]:
    """All dimensions but the channels."""
    return [0, *range(2, x.ndim)]


def _channels(t: Tensor, x: Tensor) -> Tensor:
    """A (C,) coefficient, shaped and typed to meet the wide x."""
    return t.to(x.dtype).view(-1, *[1] * (x.ndim - 2))


def centred_sums(
    x: Tensor, mask: Tensor | None, count: int | Tensor, samples: int = _PIVOT_ELEMENTS
) -> tuple[Tensor, Tensor, Tensor]:
    """A pivot p and the sums of w (x - p) and w (x - p)^2 about it; each (C,), float64."""
    wide = _wide(x)
    if mask is None:
        some = wide.flatten(2) if wide.ndim > 2 else wide.unsqueeze(-1)
        p = some[:samples, :, :_PIVOT_ELEMENTS].mean((0, 2))
    else:
        p = (
            ((wide * mask).sum(_over(x), dtype=torch.float64) / count)
            .nan_to_num(0.0, 0.0, 0.0)
            .to(wide.dtype)
        )
    b = wide - _channels(p, wide)
    wb = b if mask is None else b * mask.to(wide.dtype)
    return (
        p.double(),
        wb.sum(_over(x), dtype=torch.float64),
        (wb * b).sum(_over(x), dtype=torch.float64),
    )


def normalize(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(x - mean) * scale + shift, in the type and layout of x."""
    wide = _wide(x)
    y = (wide - _channels(mean, wide)) * _channels(scale, wide) + _channels(shift, wide)
    # Not `to` without need, which returns y itself: for an output of that kind torch 2.11 compiles
    # a gradient of zeros.
    return y if y.dtype == x.dtype else y.to(x.dtype)


def backward_sums(grad_output: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """[sum g (C), sum g (x - mean) (C)], shape (2C,), float64."""
    g, wide = _wide(grad_output), _wide(x)
    products = g * (wide - _channels(mean, wide))
    return torch.cat([t.sum(_over(x), dtype=torch.float64) for t in (g, products)])


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
