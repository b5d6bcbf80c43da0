"""Passes over x that methods share, with gradients: few, by kernels or over blocks in a cache.

What a method derives from them has (C,) or (N, C) numbers, which are left to autograd. Where a
gradient is to be differentiated, and in front of a tracer, plain operators run. On a
CPU multiplications, sums and signs are fast; comparisons and choices by booleans are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from syncnorm import ops, tracing
from syncnorm.maths import kernels
from syncnorm.maths.moments import Packed
from syncnorm.maths.shapes import facing

# Operands of a block, one after the other, should stay in the second-level cache.
_BLOCK = 131_072


def channels(values: Tensor, x: Tensor) -> Tensor:
    """Shape per-channel values (C,) as (1, C, 1, ...), to meet x (N, C, *S), in its type."""
    return facing(values.to(x.dtype), x).unsqueeze(0)


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Shape values (N, C) to be broadcast against x (N, C, *S), in its type."""
    return values.to(x.dtype).view(*values.shape, *[1] * (x.ndim - 2))


def over_positions(x: Tensor) -> Tensor:
    """Sum x (N, C, *S) over its positions: (N, C), float64."""
    return (x if x.ndim == 2 else x.flatten(2).sum(2)).double()


def by_channel(x: Tensor) -> Tensor:
    """Sum x (N, C, *S) by channel: (C,), float64."""
    return (x.sum(0) if x.ndim == 2 else over_positions(x).sum(0)).double()


def blocks(*tensors: Tensor, cuts_channels: bool = True) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors into views of some samples, and of some channels where samples are large.

    Args:
        tensors: (N, C, ...) or with 1 in place of N or C, which is not cut; first a whole one.
        cuts_channels: False for blocks of whole samples.
    """
    n, c = tensors[0].shape[:2]
    size = tensors[0].numel()
    if size <= _BLOCK or not tensors[0].is_cpu:
        yield tensors
        return
    samples = max(1, _BLOCK * n // size)
    width = max(1, _BLOCK * n * c // size) if cuts_channels and samples == 1 else c
    whole = slice(None)
    for i in range(0, n, samples):
        for k in range(0, c, width):
            cut = slice(i, i + samples), slice(k, k + width)
            yield tuple(
                t[cut[0] if t.shape[0] == n else whole, cut[1] if t.shape[1] == c else whole]
                for t in tensors
            )


def affine(x: Tensor, mean: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """Give (x - mean) scale + shift, a function of all of them.

    Args:
        x: (N, C, *S).
        mean, scale, shift: (C,), of any floating type; None: 0, 1 and 0.
    """
    if mean is None and scale is None and shift is None:
        return x
    if torch.compiler.is_compiling() or tracing.tracer_of(x) is not None:
        return by_operators(x, mean, scale, shift)
    wide = (None if each is None else each.double() for each in (mean, scale, shift))
    return _Affine.apply(x, *wide)  # pyright: ignore[reportReturnType]


class _Affine(torch.autograd.Function):
    """An affine map by channel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor | None, scale: Tensor | None, shift: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, mean, scale)
        return affine_map(x, mean, scale, shift)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mean, scale = ctx.saved_tensors
        grad_x = grad_mean = grad_scale = total = None
        if ctx.needs_input_grad[0]:
            grad_x = grad if scale is None else grad * channels(scale, grad)
        if any(ctx.needs_input_grad[1:]):
            total, grad_scale = products(grad, x, mean)
            grad_mean = -total if scale is None else -scale * total
        by_input = grad_x, grad_mean, grad_scale, total
        return tuple(
            each if needed else None
            for each, needed in zip(by_input, ctx.needs_input_grad, strict=True)
        )


def by_operators(
    x: Tensor, mean: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """`affine` in plain operators, of which any gradient is known."""
    y = x
    if mean is not None:
        # x less the rounded mean has no rounding of its own; a shift makes up for the mean's.
        centre = mean.detach().to(x.dtype)
        y, rest = x - channels(centre, x), centre.to(mean.dtype) - mean
        rest = rest if scale is None else rest * scale
        shift = rest if shift is None else rest + shift
    y = y if scale is None else y * channels(scale, x)
    return y if shift is None else y + channels(shift, x)


def affine_map(
    x: Tensor, mean: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """`affine` without a gradient."""
    zeros = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    mean = zeros if mean is None else mean
    own = kernels.fused_for(x, mean, scale, shift)
    if own is not None:
        # A variance of 1, over a count of 2, has the scale alone.
        batch = Packed(torch.cat([mean, zeros + 2, zeros[:1] + 2]))
        return own.normalize(x, batch, scale, shift, 0.0, None)[0]
    scale, shift = zeros + 1 if scale is None else scale, zeros if shift is None else shift
    return kernels.normalize(x, mean, scale, shift)


def products(g: Tensor, x: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum g and g (x - mean): (C,) each, float64; functions of all of them."""
    mean = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device) if mean is None else mean
    if torch.is_grad_enabled():
        return by_channel(g.double()), by_channel((x.double() - channels(mean, x.double())) * g)
    return kernels.backward_sums(g, x, mean).chunk(2)  # pyright: ignore[reportReturnType]


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
        as_one = x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:])
        return ops.local_sums(as_one, None).sums[:-1].view(2, *x.shape[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        shift, scale = per_sample(grad[0], x), per_sample(2 * grad[1], x)
        if torch.is_grad_enabled():
            return scale * x + shift
        grad_x = torch.empty_like(x)
        for out, block, a, b in blocks(grad_x, x, scale, shift):
            torch.mul(block, a, out=out).add_(b)
        return grad_x


def by_own_rms(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """Divide x by sqrt(mean x^2 + eps) over some dimensions within a sample; a function of x."""
    if torch.compiler.is_compiling() or tracing.tracer_of(x) is not None:
        return _by_own_rms(x, dims, eps)[0]
    return _ByOwnRms.apply(x, dims, eps)  # pyright: ignore[reportReturnType]


def _by_own_rms(x: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
    factor = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    return x * factor, factor


class _ByOwnRms(torch.autograd.Function):
    """dx = factor (g - y mean(g y)), with y = factor x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dims, ctx.eps = dims, eps
        y = torch.empty_like(x)
        for out, block in blocks(y, x, cuts_channels=False):
            out.copy_(_by_own_rms(block, dims, eps)[0])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors

        def gradient(g: Tensor, block: Tensor) -> Tensor:
            y, factor = _by_own_rms(block, ctx.dims, ctx.eps)
            return factor * (g - y * (g * y).mean(ctx.dims, keepdim=True))

        if torch.is_grad_enabled():
            return gradient(grad, x), None, None
        grad_x = torch.empty_like(x)
        for out, *block in blocks(grad_x, grad, x, cuts_channels=False):
            out.copy_(gradient(*block))
        return grad_x, None, None
