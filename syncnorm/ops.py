"""The two operations that every normalisation layer is made of: taking a statistic, and normalising by it.

    statistic = pooled_statistic(x, mask, group)                  one exchange of 2C+1 numbers
    y = normalize(x, weight, bias, statistic, eps, mask)          backward: one exchange of 2C

`normalize` differentiates through the moments too: to autograd they are part of it, so a layer may fold any
constant factors into `weight` and `bias` (batch renormalisation does) and needs no backward of its own.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from syncnorm.comm import exchange, groups, guard
from syncnorm.errors import FaultError
from syncnorm.maths import kernels
from syncnorm.maths.moments import Moments, of_sums, reciprocal

_MAX_DIMS = 8


def pooled_sums(x: Tensor, mask: Tensor | None, group: groups.Group | None) -> Tensor:
    """The raw sums [sum wx, sum wx^2, sum w] of all workers of `group`, shape (2C+1,), float64.

    *Collectives*: one all-reduce of 2C+1 numbers; every worker must call, with samples or without.
    *Gradients*: none; `normalize` accounts for them.

    Raises:
        FaultError: on every worker, if the mask of one is negative or not finite (on CUDA in debug mode only,
            where looking costs a host synchronisation; otherwise the output is NaN and the buffers keep still).
    """
    with torch.no_grad():
        sums = kernels.local_moments(x.detach(), mask)
        if mask is not None:
            sums[-1] = torch.where(is_valid(mask).all(), sums[-1], torch.nan)
        exchange.sum_(sums, group, "moments")
        # Looked at by all workers alike: whether somebody has a mask is known to that worker alone.
        if (sums.device.type == "cpu" or guard.is_debug()) and sums[-1].isnan():
            _raise_fault(mask, group, sums.device)
        return sums


def is_valid(mask: Tensor) -> Tensor:
    """Which weights are weights: finite and >= 0."""
    return (mask >= 0) & mask.isfinite()


def _raise_fault(mask: Tensor | None, group: groups.Group | None, device: torch.device) -> None:
    """Find out together whose mask is at fault, and raise the same error everywhere."""
    report = torch.zeros(1 + _MAX_DIMS, dtype=torch.float64)
    if mask is not None:
        wrong = mask[~is_valid(mask)]
        report[0] = wrong[0] if wrong.numel() else 0.0
        report[1 : 1 + mask.ndim] = torch.tensor(mask.shape)
    reports = exchange.gather(report.to(device), group, "fault").tolist()
    faults = []
    for rank, (value, *shape) in zip(groups.ranks(group), reports, strict=True):
        if not 0 <= value < float("inf"):
            faults.append(f"{value:g} (shape {tuple(int(s) for s in shape if s)}, rank {rank})")
    raise FaultError(
        f"`mask` must hold finite weights >= 0, got {', '.join(faults)}. "
        "Give weight 0 to elements that should not count. Nothing was updated."
    )


class GradientMeans(Protocol):
    """From a worker's [sum g, sum g xhat], shape (2, C), to the means of g and g xhat over the statistic.

    They enter the gradient of the input. Called once in each backward pass of a layer's call, on every worker.
    """

    def __call__(self, local: Tensor) -> Tensor: ...


class PooledMeans:
    """The exact means over all workers of `group`. *Collectives*: one all-reduce of 2C numbers."""

    def __init__(self, count: Tensor, group: groups.Group | None) -> None:
        self.count = count
        self.group = group

    def __call__(self, local: Tensor) -> Tensor:
        return exchange.sum_(local, self.group, "gradients") * reciprocal(self.count)


class Statistic(NamedTuple):
    """What a batch is normalised by."""

    batch: Moments
    gradient_means: GradientMeans
    is_pooled: bool
    """Whether other workers take part, in the backward pass too."""


def pooled_statistic(x: Tensor, mask: Tensor | None, group: groups.Group | None) -> Statistic:
    """The moments of the batch over all workers of `group`. *Collectives*: as `pooled_sums`."""
    batch = of_sums(pooled_sums(x, mask, group))
    return Statistic(batch, PooledMeans(batch.count, group), group is not None)


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, statistic: Statistic, eps: float, mask: Tensor | None
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, the moments being functions of x.

    *Gradients*: with respect to x, through the moments as well; for weight and bias local sums.
    *Collectives*: those of `gradient_means` in the backward pass, whatever needs a gradient on this worker.

    Args:
        x: shape (N, C, *S).
        weight, bias: (C,) or None, of any floating type.
        statistic: the moments, float64.
        eps: added to the variance.
        mask: as for `pooled_sums`.
    """
    anchor = None
    if statistic.is_pooled and torch.is_grad_enabled() and not _needs_grad(weight, bias):
        # Whether x needs a gradient may differ between workers; the exchange in backward must not.
        anchor = torch.zeros((), device=x.device, requires_grad=True)
    batch = statistic.batch
    return _Normalize.apply(x, weight, bias, anchor, batch.mean, batch.invstd(eps), mask, statistic.gradient_means)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


class _Normalize(torch.autograd.Function):
    """Normalisation by moments that are functions of x, known to autograd through this Function alone.

    With g = dL/dy, xhat = (x - mean) * invstd and means over the whole statistic:
        dx = weight * invstd * (g - w * (mean g + xhat * mean g xhat))      Ioffe and Szegedy 2015, section 3
        dweight = local sum g xhat        dbias = local sum g
    """

    @staticmethod
    def forward(x, weight, bias, anchor, mean, invstd, mask, gradient_means):
        scale = invstd if weight is None else weight.detach().double() * invstd
        shift = torch.zeros_like(mean) if bias is None else bias.detach().double()
        return kernels.normalize(x, mean, scale, shift)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, _, mean, invstd, mask, gradient_means = inputs
        ctx.save_for_backward(x, weight, mean, invstd, mask)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.gradient_means = gradient_means

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, mean, invstd, mask = ctx.saved_tensors
        local = kernels.backward_sums(grad_output, x, mean).view(2, -1)
        local[1] *= invstd
        grad_weight = grad_bias = grad_input = None
        if weight is not None:
            grad_weight = local[1].to(weight.dtype, copy=True)
        if ctx.bias_dtype is not None:
            grad_bias = local[0].to(ctx.bias_dtype, copy=True)
        mean_dy, mean_dy_xhat = ctx.gradient_means(local)
        if ctx.needs_input_grad[0]:
            scale = invstd if weight is None else weight.double() * invstd
            grad_input = kernels.backward_input(grad_output, x, mean, scale, mean_dy, mean_dy_xhat * invstd, mask)
        return grad_input, grad_weight, grad_bias, None, None, None, None, None


def is_recomputing() -> bool:
    """Whether this forward repeats an earlier one inside a backward pass, as activation checkpointing does.

    Exchanges are made again, since every worker repeats them; statistics must not be updated again.
    """
    # Not a documented function; FSDP2 relies on it too, and a test notices if it changes.
    return torch._C._current_graph_task_id() != -1
