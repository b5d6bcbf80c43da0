"""The two operations that every normalisation layer is made of: pooled moments, and normalisation by them.

    moments = pooled_moments(x, mask, group)                                      one exchange of 2C+1 numbers
    y = normalize(x, weight, bias, moments, eps, mask, group)                     backward: one of 2C

`normalize` differentiates through the moments too: to autograd they are part of it, so a layer may fold any
constant factors into `weight` and `bias` (batch renormalisation does) and needs no backward of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from syncnorm.comm import exchange, groups, guard
from syncnorm.errors import FaultError
from syncnorm.maths import kernels, moments
from syncnorm.maths.moments import Moments

_MAX_DIMS = 8


def pooled_moments(x: Tensor, mask: Tensor | None, group: groups.Group | None) -> Moments:
    """Count, mean and m2 of every channel over all workers of `group`.

    *Collectives*: one all-reduce of 2C+1 numbers; every worker must call, with samples or without.
    *Gradients*: none; `normalize` accounts for them.

    Raises:
        FaultError: on every worker, if the mask of one is negative or not finite (on CUDA in debug mode only,
            where looking costs a host synchronisation; otherwise the output is NaN and the buffers keep still).
    """
    with torch.no_grad():
        sums = kernels.local_moments(x.detach(), mask)
        if mask is not None:
            is_valid = ((mask >= 0) & mask.isfinite()).all()
            sums[-1] = torch.where(is_valid, sums[-1], torch.nan)
        exchange.sum_(sums, group, "moments")
        # Looked at by all workers alike: whether somebody has a mask is known to that worker alone.
        if (sums.device.type == "cpu" or guard.is_debug()) and sums[-1].isnan():
            _raise_fault(mask, group, sums.device)
        return moments.of_sums(sums)


def _raise_fault(mask: Tensor | None, group: groups.Group | None, device: torch.device) -> None:
    """Find out together whose mask is at fault, and raise the same error everywhere."""
    report = torch.zeros(1 + _MAX_DIMS, dtype=torch.float64)
    if mask is not None:
        wrong = mask[~((mask >= 0) & mask.isfinite())]
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


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    batch: Moments,
    eps: float,
    mask: Tensor | None,
    group: groups.Group | None,
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, the moments being those of x over all workers.

    *Gradients*: with respect to x, through the moments as well; for weight and bias local sums.
    *Collectives*: in the backward pass one all-reduce of 2C numbers, whatever needs a gradient on this worker.
    """
    anchor = None
    if group is not None and torch.is_grad_enabled() and not _needs_grad(weight, bias):
        # Whether x needs a gradient may differ between workers; the exchange in backward must not.
        anchor = torch.zeros((), device=x.device, requires_grad=True)
    return _Normalize.apply(x, weight, bias, anchor, batch.mean, batch.invstd(eps), batch.count, mask, group)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


class _Normalize(torch.autograd.Function):
    """Normalisation by moments that are functions of x, known to autograd through this Function alone.

    With g = dL/dy, xhat = (x - mean) * invstd and sums over all workers:
        dx = weight * invstd * (g - w / n * (sum g + xhat * sum g xhat))      Ioffe and Szegedy 2015, section 3
        dweight = local sum g xhat        dbias = local sum g
    """

    @staticmethod
    def forward(x, weight, bias, anchor, mean, invstd, count, mask, group):
        scale = invstd if weight is None else weight.detach().double() * invstd
        shift = torch.zeros_like(mean) if bias is None else bias.detach().double()
        return kernels.normalize(x, mean, scale, shift)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, _, mean, invstd, count, mask, group = inputs
        ctx.save_for_backward(x, weight, mean, invstd, count, mask)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.group = group

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, mean, invstd, count, mask = ctx.saved_tensors
        sums = kernels.backward_sums(grad_output, x, mean)
        grad_weight = grad_bias = grad_input = None
        if weight is not None:
            grad_weight = (sums[mean.numel() :] * invstd).to(weight.dtype)
        if ctx.bias_dtype is not None:
            grad_bias = sums[: mean.numel()].to(ctx.bias_dtype, copy=True)
        exchange.sum_(sums, ctx.group, "gradients")
        if ctx.needs_input_grad[0]:
            sum_dy, sum_dy_centred = sums.chunk(2)
            share = moments.reciprocal(count)
            scale = invstd if weight is None else weight.double() * invstd
            grad_input = kernels.backward_input(
                grad_output, x, mean, scale, sum_dy * share, sum_dy_centred * invstd.square() * share, mask
            )
        return grad_input, grad_weight, grad_bias, None, None, None, None, None, None
