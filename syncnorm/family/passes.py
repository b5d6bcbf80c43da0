"""Passes over x that methods share, with gradients: few of them, by the primitives of `maths.kernels`.

What a method derives from them has (C,) or (N, C) numbers, which are left to autograd. Where a
gradient is to be differentiated, and in front of what looks at operators, plain operators run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from syncnorm import observed
from syncnorm.maths import kernels

# Operands of a block, one after the other, should stay in the second-level cache.
_BLOCK = 65_536


def channels(values: Tensor, x: Tensor) -> Tensor:
    """Shape per-channel values (C,) to be broadcast against x (N, C, *S), in its type."""
    return values.to(x.dtype).view(-1, *[1] * (x.ndim - 2))


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Shape values (N, C) to be broadcast against x (N, C, *S), in its type."""
    return values.to(x.dtype).view(*values.shape, *[1] * (x.ndim - 2))


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of as many samples into small blocks of some of them."""
    first = tensors[0]
    size = max(1, _BLOCK * len(first) // max(1, first.numel()))
    return zip(*(each.split(size) for each in tensors), strict=True)


def affine(x: Tensor, mean: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """Give (x - mean) scale + shift, a function of all of them.

    Args:
        x: (N, C, *S).
        mean, scale, shift: (C,), of any floating type; None: 0, 1 and 0.
    """
    if mean is None and scale is None and shift is None:
        return x
    if torch.compiler.is_compiling() or observed.observer(x) is not None:
        y = x if mean is None else x - channels(mean, x)
        y = y if scale is None else y * channels(scale, x)
        return y if shift is None else y + channels(shift, x)
    zeros = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    return _Affine.apply(  # pyright: ignore[reportReturnType]
        x,
        zeros if mean is None else mean.double(),
        zeros + 1 if scale is None else scale.double(),
        zeros if shift is None else shift.double(),
    )


class _Affine(torch.autograd.Function):
    """An affine map by channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, mean, scale)
        return kernels.normalize(x, mean, scale, shift)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mean, scale = ctx.saved_tensors
        grad_x = grad_mean = grad_scale = total = None
        if ctx.needs_input_grad[0]:
            grad_x = grad * channels(scale, grad)
        if any(ctx.needs_input_grad[1:]):
            total, grad_scale = _products(grad, x, mean)
            grad_mean = -scale * total
        return grad_x, grad_mean, grad_scale, total


def _products(g: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of g and of g (x - mean), (C,) each, float64; functions of all of them."""
    if not torch.is_grad_enabled():
        total, products = kernels.backward_sums(g, x, mean).chunk(2)
        return total, products
    dims, wide = [0, *range(2, x.ndim)], g.double()
    return wide.sum(dims), (wide * (x.double() - channels(mean, wide))).sum(dims)


def sample_sums(x: Tensor) -> Tensor:
    """Sum x and x^2 over the positions of each sample: (2, N, C), float64, a function of x."""
    return _SampleSums.apply(x)  # pyright: ignore[reportReturnType]


class _SampleSums(torch.autograd.Function):
    """Sums of samples, whose channels are taken as channels of one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        if x.ndim == 2:
            return torch.stack([x.double(), x.double().square()])
        return kernels.local_moments(_as_one(x), None)[:-1].view(2, *x.shape[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        of_sum, of_square = grad
        if torch.is_grad_enabled() or x.ndim == 2:
            return 2 * per_sample(of_square, x) * x + per_sample(of_sum, x)
        one, shift = _as_one(x), of_sum.flatten()
        return kernels.normalize(one, 0 * shift, 2 * of_square.flatten(), shift).view(x.shape)


def _as_one(x: Tensor) -> Tensor:
    return x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:])
