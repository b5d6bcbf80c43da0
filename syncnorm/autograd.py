"""The autograd Functions: one for y and its gradient, one for that gradient and its own.

With g = dL/dy, xhat = (x - mean) * s, s = invstd, and means over the whole statistic:

    dx = weight * s * (g - w * (A + xhat * B))        A = mean g        B = mean g xhat
    dweight = local sum g xhat                        dbias = local sum g

Ioffe and Szegedy 2015, section 3. The moments are functions of x, known to autograd through these
Functions alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from syncnorm import tracing
from syncnorm.errors import InputError
from syncnorm.maths import formula, kernels
from syncnorm.maths.double_backward import SecondDerivative
from syncnorm.maths.moments import reciprocal
from syncnorm.undocumented import leave_uncompiled

_THIRD = (
    "the gradient of this layer must be differentiated once, got a third derivative through it. "
    "Take one of lower order (torch.autograd.functional.vhp, where hvp takes a third), or a method "
    "of syncnorm.family whose gradients have any."
)
ANCHOR = torch.zeros((), requires_grad=True, device="cpu")
"""Keeps a Function in the backward pass where nothing else needs a gradient. Its own is None."""


class GradientMeans(Protocol):
    """Pools a worker's [sum g, sum g xhat], shape (2, C), over the whole statistic.

    Their means enter the gradient of the input. Called once in each backward pass of a layer's call, on
    every worker.
    """

    @property
    def is_local(self) -> bool:
        """True if they are the means over this worker's batch, so that nothing is exchanged."""
        ...

    def totals(self, local: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sums and n, of which the means are sums / n; n is None if the sums are means already."""
        ...

    def double_backward_means(self, local: Tensor) -> Tensor:
        """The means of five sums, shape (5, C), where the gradient is differentiated.

        See `syncnorm.maths.double_backward`.
        """
        ...

    def for_inner_gradient(self) -> GradientMeans:
        """The same for a gradient that enters a loss (`create_graph=True`), as in a gradient penalty."""
        ...

    def for_repetition(self) -> GradientMeans:
        """Another object of the same, for a repetition of the call, which belongs to no step."""
        ...


class Normalize(torch.autograd.Function):
    """y = (x - mean) * invstd * weight + bias, and its gradient."""

    # With ctx as an argument: a separate setup_context costs more per call than the C-sized
    # arithmetic.
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        anchor: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        mask: Tensor | None,
        gradient_means: GradientMeans,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, invstd, mask)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.gradient_means = gradient_means
        scale = invstd if weight is None else weight.detach().to(invstd.dtype) * invstd
        shift = torch.zeros_like(mean) if bias is None else bias.detach().to(mean.dtype)
        return kernels.normalize(x, mean, scale, shift)

    @staticmethod
    @leave_uncompiled
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, mask = ctx.saved_tensors
        tracer = tracing.tracer_of(grad_output)
        if tracer is not None and tracer != tracing.FAKE:
            grads = formula_gradient(
                tracer, ctx.gradient_means, grad_output, x, weight, mask, invstd
            )
            return *_typed(*grads, weight, ctx.bias_dtype), None, None, None, None, None
        saved = (grad_output, x, weight, mean, invstd, mask)
        how = (ctx.gradient_means, ctx.bias_dtype, ctx.needs_input_grad[0])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Whether g, x or weight needs a gradient may differ between workers; the exchange must
            # not.
            grads = _Gradient.apply(*saved, ANCHOR, *how)
        else:
            grads, _ = _gradient(*saved, *how)
        return *grads, None, None, None, None, None


def formula_gradient(
    tracer: str, gradient_means: GradientMeans, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias in operators that torch batches and differentiates itself."""
    if not gradient_means.is_local:
        raise tracing.refuse(tracer, "the backward pass")
    return formula.gradient(*args)


def _typed(
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    weight: Tensor | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients that there is a weight and a bias for, in their types."""
    return (
        dx,
        None if weight is None else dweight.to(weight.dtype),
        None if bias_dtype is None else dbias.to(bias_dtype),
    )


def _gradient(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    mask: Tensor | None,
    gradient_means: GradientMeans,
    bias_dtype: torch.dtype | None,
    needs_input: bool,
) -> tuple[tuple[Tensor | None, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]:
    """dx, dweight, dbias; A and B. The exchange is made whatever is needed."""
    local = kernels.backward_sums(g, x, mean).view(2, -1)
    local[1] *= invstd
    grad_weight = grad_bias = grad_input = None
    if weight is not None:
        grad_weight = local[1].to(weight.dtype, copy=True)
    if bias_dtype is not None:
        grad_bias = local[0].to(bias_dtype, copy=True)
    totals, n = gradient_means.totals(local)
    mean_dy, mean_dy_xhat = totals if n is None else totals * reciprocal(n)
    if needs_input:
        scale = invstd if weight is None else weight.to(invstd.dtype) * invstd
        grad_input = kernels.backward_input(g, x, mean, scale, mean_dy, mean_dy_xhat * invstd, mask)
    return (grad_input, grad_weight, grad_bias), (mean_dy, mean_dy_xhat)


def differentiable_gradient(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    mask: Tensor | None,
    gradient_means: GradientMeans,
    needs_input: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """dx, dweight and dbias (float64) as functions of g, x and weight.

    Whether one of them needs a gradient may differ between workers; the exchange must not.
    """
    saved, how = (g, x, weight, mean, invstd, mask), (gradient_means, mean.dtype, needs_input)
    if torch.compiler.is_compiling():
        (dx, dweight, dbias), _ = _gradient(*saved, *how)
    else:
        dx, dweight, dbias = _Gradient.apply(*saved, ANCHOR, *how)
    assert dbias is not None
    return dx, dweight, dbias


class _Gradient(torch.autograd.Function):
    """The gradient as a function of g, x and weight, differentiable once.

    See `syncnorm.maths.double_backward`.
    """

    @staticmethod
    def forward(
        ctx, g, x, weight, mean, invstd, mask, anchor, gradient_means, bias_dtype, needs_input
    ):  # pyright: ignore[reportIncompatibleMethodOverride]
        inner = gradient_means.for_inner_gradient()
        grads, means = _gradient(g, x, weight, mean, invstd, mask, inner, bias_dtype, needs_input)
        ctx.save_for_backward(g, x, weight, mean, invstd, mask, *means)
        ctx.gradient_means, ctx.bias_dtype = gradient_means, bias_dtype
        return grads

    @staticmethod
    def backward(ctx, v, u, t):  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors  # once: activation checkpointing gives them out no second time
        with torch.no_grad():
            grads = _Gradient._backward(ctx, saved, v, u, t)
        sources = [each for each in (v, u, t, *saved[:3]) if each is not None]
        return *(
            None if each is None else not_differentiable(_THIRD, each, *sources) for each in grads
        ), *[None] * 7

    @staticmethod
    def _backward(ctx, saved, v, u, t):
        """The gradients by g, x and weight."""
        g, x, weight, mean, invstd, mask, *means = saved
        tracer = next(
            filter(None, (tracing.tracer_of(each) for each in (v, u, t) if each is not None)), None
        )
        if tracer is not None and tracer != tracing.FAKE:
            with torch.enable_grad():
                # Views, so that what g is made from is not gone through.
                g, x, weight = (
                    None if each is None else each.view_as(each) for each in (g, x, weight)
                )
                grads = formula_gradient(tracer, ctx.gradient_means, g, x, weight, mask, invstd)
            return _pull_back(_typed(*grads, weight, ctx.bias_dtype), (v, u, t), (g, x, weight))
        wide = torch.promote_types(x.dtype, torch.float32)
        v = torch.zeros_like(x) if v is None else v
        u, t = (torch.zeros_like(mean) if each is None else each.to(mean.dtype) for each in (u, t))
        scale = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        second = SecondDerivative(
            v.to(wide), u, t, g.to(wide), x.to(wide), mask, scale, mean, invstd, *means
        )
        sums = second.sums()
        grad_g = grad_x = grad_weight = None
        if weight is not None:
            grad_weight = second.wrt_weight(sums).to(weight.dtype)
        sums[:3] *= scale
        pooled = ctx.gradient_means.double_backward_means(sums)
        if ctx.needs_input_grad[0]:
            grad_g = second.wrt_gradient(pooled).to(g.dtype)
        if ctx.needs_input_grad[1]:
            grad_x = second.wrt_input(pooled).to(x.dtype)
        return [grad_g, grad_x, grad_weight]


def not_differentiable(message: str, grad: Tensor, *sources: Tensor) -> Tensor:
    """Return a gradient whose own is an InputError with this message.

    torch's `once_differentiable` raises in no pass that names its inputs: what else leads to them
    is taken for the whole there.

    Args:
        message: of the error.
        grad: the gradient.
        sources: what it is made from.
    """
    return _NotDifferentiable.apply(message, grad, *sources)  # pyright: ignore[reportReturnType]


class _NotDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, message, grad, *sources):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.message = message
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, v):  # pyright: ignore[reportIncompatibleMethodOverride]
        raise InputError(ctx.message)


def _pull_back(
    outputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of the outputs that have a cotangent, by each input that needs one."""
    pairs = [
        (o, c) for o, c in zip(outputs, cotangents, strict=True) if o is not None and c is not None
    ]
    needed = [t for t in inputs if t is not None and t.requires_grad]
    grads = iter(
        torch.autograd.grad([o for o, _ in pairs], needed, [c for _, c in pairs], allow_unused=True)
    )
    return [next(grads) if t is not None and t.requires_grad else None for t in inputs]
