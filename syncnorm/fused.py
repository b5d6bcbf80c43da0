"""The autograd Function where kernels finish statistics themselves: on CUDA, and natively on a CPU.

It is `syncnorm.autograd.Normalize` with the arithmetic of (C,)-sized numbers moved into the kernels
(see `syncnorm.maths.kernels.composed`), which would otherwise take most of the launches and of the calls. Beside
y a call leaves what it was made by in the batch's `rows`: mean, m2 and invstd, and r and d of batch
renormalisation.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from syncnorm import tracing
from syncnorm.autograd import GradientMeans, differentiable_gradient, formula_gradient
from syncnorm.maths.kernels import Reference
from syncnorm.maths.moments import Moments
from syncnorm.undocumented import in_memory, is_wrapper, leave_uncompiled, plain_apply

# Of what follows x, weight and bias among the arguments below.
_NO_GRADIENTS = (None,) * 7


class FusedNormalize(torch.autograd.Function):
    """y = (x - mean) * invstd * r * weight + d * weight + bias, and its gradient."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        anchor: Tensor | None,
        mask: Tensor | None,
        kernels: ModuleType,
        batch: Moments,
        eps: float,
        reference: Reference | None,
        gradient_means: GradientMeans,
    ) -> Tensor:
        y, batch.rows = kernels.normalize(x, batch, weight, bias, eps, reference)
        ctx.save_for_backward(x, weight, batch.rows, mask)
        ctx.kernels, ctx.gradient_means = kernels, gradient_means
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @leave_uncompiled
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, g: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, rows, mask = ctx.saved_tensors
        g = g.resolve_neg()
        if type(g) is not Tensor:
            g = in_memory(g)
        tracer = tracing.tracer_of(g)
        is_seen = torch.is_grad_enabled() or torch.compiler.is_compiling()
        # Of one that is a wrapper still, kernels would read at its address, which is none.
        is_seen = is_seen or (type(g) is not Tensor and is_wrapper(g))
        if is_seen or (tracer is not None and tracer != tracing.FAKE):
            grads = _differentiable(ctx, g, x, weight, rows, mask, tracer)
            return *grads, *_NO_GRADIENTS
        local, grad_weight, grad_bias = ctx.kernels.backward_sums(
            g, x, rows, None if weight is None else weight.dtype, ctx.bias_dtype
        )
        totals, n = ctx.gradient_means.totals(local)
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input = ctx.kernels.backward_input(g, x, rows, weight, totals, n, mask)
        return grad_input, grad_weight, grad_bias, *_NO_GRADIENTS


# The kernels are given nothing that a transform looks at.
apply_fused: Callable[..., Any] = plain_apply(FusedNormalize)


def _differentiable(
    ctx,
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rows: Tensor,
    mask: Tensor | None,
    tracer: str | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradient in operators that torch knows: batched, differentiated again, compiled or wrapped."""
    mean, _, invstd, *correction = rows.unbind()
    folded = weight
    if correction:
        folded = correction[0] if weight is None else weight * correction[0]
    if tracer is not None and tracer != tracing.FAKE:
        dx, sum_g_xhat, sum_g = formula_gradient(
            tracer, ctx.gradient_means, g, x, folded, mask, invstd
        )
    else:
        dx, sum_g_xhat, sum_g = differentiable_gradient(
            g, x, folded, mean, invstd, mask, ctx.gradient_means, ctx.needs_input_grad[0]
        )
    grad_weight = None
    if weight is not None and sum_g_xhat is not None:
        if correction:
            r, d, *_ = correction
            sum_g_xhat = r * sum_g_xhat + d * sum_g
        grad_weight = sum_g_xhat.to(weight.dtype)
    return (
        dx if ctx.needs_input_grad[0] else None,
        grad_weight,
        None if ctx.bias_dtype is None else sum_g.to(ctx.bias_dtype),
    )
