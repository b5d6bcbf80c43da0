"""The gradient that is no derivative, of layers that divide by a root mean square.

    z = x / sqrt(square + eps)        dx = (g - w c z) / sqrt(square + eps)        g = dL/dz

square and c are per channel, and constants of the call; w are the weights of the mask. With the
batch's own mean square and c = sum g z / n, n = sum w, this is the derivative: the sum is over all
outputs, and the correction of an element has its weight. A method takes averages over steps
instead: each says which, and where the batch's sums go.

Averages of gradients have the scale of the loss. Where that changes, as with gradient scaling, they
follow within the steps that they average. That DistributedDataParallel averages over the workers is
reckoned with: they hold for another number of workers, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncnorm.autograd import ANCHOR, not_differentiable
from syncnorm.family.passes import affine_map, products
from syncnorm.maths import kernels


class Call(NamedTuple):
    """A training forward: what it divides by, and how its gradient is corrected."""

    square: Tensor
    """(C,), float64."""
    correction: Callable[[Tensor], Tensor]
    """Takes this worker's sum g z, (C,), in the backward pass; returns c, (C,)."""
    gain: Tensor | None = None
    """What the output is multiplied by, (C,); a constant to autograd. None: 1."""
    gradient_gain: Tensor | None = None
    """What g is multiplied by before all else, (C,). None: 1."""

    def for_repetition(self) -> Call:
        """Return itself: a repeated forward has the same numbers, and one backward pass."""
        return self


def mean_of(total: Tensor) -> Tensor:
    """The means of sums with their count behind them; 0 where the count is 0."""
    return torch.where(total[-1] > 0, total[:-1] / total[-1], 0.0)


def square_of(total: Tensor) -> Tensor:
    """The mean squares to divide by; where nothing counts infinity, so that z is 0."""
    return torch.where(total[-1] > 0, mean_of(total), torch.inf)


def divide(
    x: Tensor, weights: Tensor | None, call: Call, eps: float, gradient_scale: float
) -> Tensor:
    """Divide x (N, C, *S) by a call's root mean square. Takes part in every backward pass.

    Args:
        x: (N, C, *S).
        weights: the mask's, or None.
        call: see there.
        eps: added to the mean square.
        gradient_scale: what the gradient will be divided by, see `Pooling.gradient_scale`.
    """
    scale = (call.square + eps).rsqrt()
    return _Divide.apply(x, weights, scale, call, gradient_scale, ANCHOR)  # pyright: ignore[reportReturnType]


class _Divide(torch.autograd.Function):
    """z = x / sqrt(square + eps), times the gain, and the corrected gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor | None,
        scale: Tensor,
        call: Call,
        gradient_scale: float,
        anchor: Tensor,
    ) -> Tensor:
        # Not the output, which an activation may write over.
        ctx.save_for_backward(x, scale, weights, call.gain, call.gradient_gain)
        ctx.correction, ctx.gradient_scale = call.correction, gradient_scale
        return affine_map(x, None, scale if call.gain is None else scale * call.gain, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, scale, weights, gain, gradient_gain = ctx.saved_tensors
        with torch.no_grad():
            gained = torch.ones_like(scale)
            for each in (gain, gradient_gain):
                gained = gained if each is None else gained * each
            # Of the gained gradient times z.
            local = gained * scale * products(grad, x, None)[1]
            c = ctx.correction(local / ctx.gradient_scale) * ctx.gradient_scale
            zeros, b = torch.zeros_like(c), c * scale / gained
            grad_input = kernels.backward_input(grad, x, zeros, gained * scale, zeros, b, weights)
        return once_differentiated(grad_input, grad, x), *[None] * 5


def once_differentiated(grad_input: Tensor, *sources: Tensor) -> Tensor:
    """Return a gradient that is no derivative, as one that cannot be differentiated."""
    return not_differentiable(
        "the gradient of this layer must not be differentiated, got a second backward pass "
        "through it. It is made of averages over steps and is no derivative of the output; "
        "take a layer whose gradient is one, such as SyncBatchNorm.",
        grad_input,
        *sources,
    )
