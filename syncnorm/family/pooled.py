"""Sums and moments over all workers, with gradients: what the methods of the family are made of.

A method says which sums travel (`pooled_sum`) or takes moments (`pooled_moments`); autograd derives
its gradient, and the backward pass of a pooled sum is one more pooled sum.

A forward that activation checkpointing repeats takes the totals of the first, and exchanges nothing.
So workers may differ in what they checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from syncnorm import ops, tracing
from syncnorm.autograd import ANCHOR
from syncnorm.comm import exchange, groups
from syncnorm.errors import FaultError
from syncnorm.family.passes import affine_map, by_operators
from syncnorm.maths.moments import Raw, Unread
from syncnorm.maths.precision import HALF_TYPES
from syncnorm.statistics import repeated

if TYPE_CHECKING:
    from syncnorm.family.layer import Pooling


def pooled_sum(local: Tensor, group: groups.Group | None, layer: Pooling) -> Tensor:
    """Sum a tensor over the workers of a group; differentiable any number of times.

    *Collectives*: one all-reduce, and another for each backward pass through it; every worker must
    call. *Gradients*: each worker gets the sum of all workers' gradients.

    Args:
        local: any shape, the same on all workers; travels as float64.
        group: the workers; None: this one alone.
        layer: the layer that sums.

    Returns:
        float64, the same bits on every worker.
    """
    local = local.double()
    if group is None:
        return local
    total = repeated.same(layer, lambda: _sum(local, group, "sums", layer.label))
    return _PooledSum.apply(local, total, group, layer.label, ANCHOR)  # pyright: ignore[reportReturnType]


def _sum_of_gradients(grad: Tensor, group: groups.Group | None, name: str) -> Tensor:
    """Sum gradients over the workers of a group, as `pooled_sum`.

    Under a kind of its own: a worker's forward must not meet the backward pass of another.
    """
    grad = grad.double()
    if group is None:
        return grad
    return _PooledSum.apply(grad, _sum(grad, group, "gradients", name), group, name, ANCHOR)  # pyright: ignore[reportReturnType]


def _sum(local: Tensor, group: groups.Group, kind: str, name: str) -> Tensor:
    return exchange.sum_(local.detach().flatten(), group, kind, name).view(local.shape)


class _PooledSum(torch.autograd.Function):
    """The gradient of a sum that has been exchanged."""

    @staticmethod
    def forward(
        ctx: Any, local: Tensor, total: Tensor, group: groups.Group, name: str, anchor: Tensor
    ) -> Tensor:
        ctx.group, ctx.name = group, name
        return total.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _sum_of_gradients(grad, ctx.group, ctx.name), None, None, None, None


@dataclass(frozen=True)
class RegionMoments:
    """Moments of R regions of a batch, over all workers; float64, with gradients."""

    mean: Tensor
    """(R, C); 0 where a region is empty."""
    var: Tensor
    """(R, C), biased; 0 where a region is empty."""
    count: Tensor
    """(R,), the sum of the weights; without a gradient."""


def pooled_moments(
    x: Tensor, weights: Sequence[Tensor | None], group: groups.Group | None, layer: Pooling
) -> RegionMoments:
    """Take moments of x per channel, for each of several weightings of its elements.

        n = sum w        mean = sum w x / n        var = sum w (x - mean)^2 / n

    *Collectives*: one all-reduce of R(2C+1) numbers, and one of 2RC in the backward pass; every
    worker must call, with samples or without.

    Args:
        x: (N, C, *S), floating.
        weights: R weightings, each (N, 1, *S) or None for 1 everywhere; without gradients.
        group: the workers; None: this one alone.
        layer: the layer that takes them.

    Raises:
        FaultError: on every worker, if a weight of one of them is negative or not finite.
    """
    total = repeated.same(layer, lambda: _total(x, weights, group, layer.label))
    return moments_of_sums(x, weights, total, group, layer.label)


def _total(
    x: Tensor, weights: Sequence[Tensor | None], group: groups.Group | None, name: str
) -> Tensor:
    """Sum [w x, w x^2, w] for each weighting over all workers, (R, 2C+1)."""
    local = torch.cat([ops.message_of(ops.local_sums(x, each)) for each in weights])
    total = exchange.sum_(local, group, "moments", name).view(len(weights), -1)
    if tracing.is_readable(total) and any(map(math.isnan, total[:, -1].tolist())):
        # Of two weightings the second is what the first leaves of 1.
        rule = "finite weights >= 0" if len(weights) == 1 else "weights in [0, 1]"
        raise FaultError(f"`mask` must hold {rule}, in {name}. Nothing was updated.")
    return total


def moments_of_sums(
    x: Tensor,
    weights: Sequence[Tensor | None],
    total: Tensor,
    group: groups.Group | None,
    name: str,
) -> RegionMoments:
    """Finish the moments of which all workers' sums are there, with gradients.

    *Collectives*: one all-reduce of 2RC numbers in the backward pass.

    Args:
        x, weights, group: see `pooled_moments`.
        name: of the layer, for errors.
        total: (R, 2C+1), [sum w x, sum w x^2, sum w] over all workers, float64.
    """
    moments = Raw if tracing.is_readable(total) else Unread.of_sums
    parts = [moments(row) for row in total]
    mean = torch.stack([part.mean for part in parts])
    var = torch.stack([part.var for part in parts])
    count = torch.stack([part.count for part in parts])
    # Whether x needs a gradient may be known to this worker alone; each takes part in the backward
    # pass.
    if torch.is_grad_enabled() and (x.requires_grad or group is not None):
        mean, var = _Moments.apply(x, mean, var, count, group, name, ANCHOR, *weights)  # pyright: ignore[reportGeneralTypeIssues]
    return RegionMoments(mean, var, count)


class _Moments(torch.autograd.Function):
    """The gradient of moments that have been computed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        group: groups.Group | None,
        name: str,
        anchor: Tensor,
        *weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        mean, var = mean.clone(), var.clone()
        ctx.group, ctx.name, ctx.has = group, name, [each is not None for each in weights]
        # The mean is kept as an output, so that a second derivative goes through it, too.
        ctx.save_for_backward(x, mean, count, *(each for each in weights if each is not None))
        return mean, var

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mean, count, *given = ctx.saved_tensors
        # The moments are the same on all workers: each owes its share of all workers' losses.
        total = _sum_of_gradients(torch.stack([grad_mean, grad_var]), ctx.group, ctx.name)
        of_mean, of_var = total / count.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
        wide, weights, grad = widened(x), iter(given), None
        for *row, has_weights in zip(mean, 2 * of_var, of_mean, ctx.has, strict=True):
            part = _affine(wide, *row)
            part = part * next(weights).to(wide.dtype) if has_weights else part
            grad = part if grad is None else grad + part
        assert grad is not None
        return grad.to(x.dtype), *[None] * (6 + len(ctx.has))


def _affine(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(x - mean) scale + shift; a function of all of them where gradients are differentiated."""
    if torch.is_grad_enabled():
        return by_operators(x, mean, scale, shift)
    return affine_map(x, mean, scale, shift)


def unbiased(var: Tensor, count: Tensor, otherwise: Tensor) -> Tensor:
    """Make a biased variance unbiased; a single value says nothing about it, and has another."""
    return torch.where(count > 1, var * count / (count - 1).clamp(min=1), otherwise)


def not_negative(var: Tensor) -> Tensor:
    """Put 0 where rounding has left less, with the gradient of what is exactly 0 there.

    A clamp has none: the second derivative of a variance that is 0 is not 0.
    """
    return var + (-var.detach()).clamp(min=0)


def widened(x: Tensor) -> Tensor:
    """Convert half types to float32, to compute in it."""
    return x.float() if x.dtype in HALF_TYPES else x
