"""EvoNorm-B0, B1 and B2: normalisation and activation in one layer. arXiv:2004.02967, table 1.

    B0:  z = x / max(sqrt(var + eps), v x + sqrt(var_nchw + eps))
    B1:  z = x / max(sqrt(var + eps), (x + 1) rms_nchw)
    B2:  z = x / max(sqrt(var + eps), rms_nchw - x)
    y = z weight + bias

var is the biased variance of a channel over the batch, var_nchw that of a sample's channel over its
positions, rms_nchw the root of the mean of its squares plus eps; v is a parameter per channel. In
evaluation var is the running variance, which follows the unbiased one. No mean is subtracted.

*Collectives*: one all-reduce of 2C+1 numbers, and one in the backward pass.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from syncnorm.comm import groups
from syncnorm.errors import InputError
from syncnorm.family.layer import FamilyLayer
from syncnorm.family.passes import blocks, channels, over_positions, per_sample, sample_sums
from syncnorm.family.pooled import not_negative, pooled_sum, unbiased


class EvoNorm(FamilyLayer):
    """EvoNorm-B0, B1 or B2 over the batches of all workers; needs positions, (N, C, *S).

    It takes the place of a norm and the activation behind it.

    Args:
        num_features: channels C.
        variant: "b0", "b1" or "b2".
        eps: added to variances and mean squares.
        momentum: weight of a batch in the running variance; None: it is the average over all.
        options: see `FamilyLayer`.
    """

    v: Tensor | None
    ones: ClassVar[frozenset[str]] = FamilyLayer.ones | {"v"}
    scales_at_once: ClassVar[bool] = True

    def __init__(
        self,
        num_features: int,
        variant: Literal["b0", "b1", "b2"] = "b0",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        **options: Any,
    ) -> None:
        if variant not in ("b0", "b1", "b2"):
            raise InputError(f'`variant` must be "b0", "b1" or "b2", got {variant!r}')
        super().__init__(num_features, eps, momentum, **options)
        del self.running_mean
        self.variant = variant
        v = None
        if variant == "b0":
            v = nn.Parameter(torch.ones_like(self.running_var))
        self.register_parameter("v", v)

    def extra_repr(self) -> str:
        """Describe the arguments."""
        return f"{super().extra_repr()}, variant={self.variant!r}"

    def message_sizes(self) -> list[int]:
        return 2 * [2 * self.num_features + 1]

    def check(self, x: Tensor) -> None:
        """Raise InputError for an input without positions, before any exchange."""
        super().check(x)
        if x.ndim < 3:
            raise InputError(f"`x` must have positions, (N, C, *S), got shape {tuple(x.shape)}")

    def normalize(self, x: Tensor) -> Tensor:
        """Normalise by the batch."""
        sums = sample_sums(x)
        count, var = self._pooled(sums, x, self.group)
        self.follow(count, var=unbiased(var, count, self.running_var))
        return self._divide(x, sums, var)

    def batch_statistics(
        self, x: Tensor, group: groups.Group | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Take what a batch is normalised by: its count, and its biased variance as `var`."""
        count, var = self._pooled(sample_sums(x), x, group)
        return count, {"var": var}

    def _pooled(self, sums: Tensor, x: Tensor, group: groups.Group | None) -> tuple[Tensor, Tensor]:
        count = sums.new_full((1,), x.numel() / self.num_features)
        total = pooled_sum(torch.cat([*sums.sum(1), count]), group, self)
        n = total[-1].clamp(min=1)
        mean, square = (total[:-1] / n).chunk(2)
        return total[-1].detach(), not_negative(square - mean.square())

    def evaluate(self, x: Tensor) -> Tensor:
        """Normalise by the running variance."""
        return self._divide(x, sample_sums(x), self.running_var)

    def _divide(self, x: Tensor, sums: Tensor, var: Tensor) -> Tensor:
        mean, square = sums / math.prod(x.shape[2:])  # of samples, (N, C)
        if self.v is not None:
            slope = self.v.double().expand_as(mean)
            offset = (not_negative(square - mean.square()) + self.eps).sqrt()
        else:
            offset = (square + self.eps).sqrt()
            slope = offset if self.variant == "b1" else torch.full_like(offset, -1)
        left = channels((var.double() + self.eps).sqrt(), x)
        weight, bias = (
            x.new_full((1,) * x.ndim, neutral) if each is None else channels(each, x)
            for each, neutral in ((self.weight, 1.0), (self.bias, 0.0))
        )
        y: Tensor = _Divide.apply(  # pyright: ignore[reportAssignmentType]
            x, left, per_sample(slope, x), per_sample(offset, x), weight, bias
        )
        return y


class _Divide(torch.autograd.Function):
    """x / max(left, slope x + offset) weight + bias, a function of all of them.

    left, weight and bias are (1, C, 1, ...), slope and offset (N, C, 1, ...), in the type of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        left: Tensor,
        slope: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, left, slope, offset, weight)
        y = torch.empty_like(x)
        for out, block, least, a, b, w, shift in blocks(y, x, left, slope, offset, weight, bias):
            torch.maximum(torch.mul(block, a, out=out).add_(b), least, out=out)
            torch.div(block, out, out=out).mul_(w).add_(shift)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *others = ctx.saved_tensors
        gradient = _gradient if torch.is_grad_enabled() else _gradient_in_blocks
        of_x, of_left, of_slope, of_offset, *of_affine = gradient(grad, x, *others)
        of_slope, of_offset = per_sample(of_slope, x), per_sample(of_offset, x)
        of_left, *of_affine = (channels(each.sum(0), x) for each in (of_left, *of_affine))
        return of_x, of_left, of_slope, of_offset, *of_affine


def _gradient_in_blocks(
    grad: Tensor, x: Tensor, left: Tensor, slope: Tensor, offset: Tensor, weight: Tensor
) -> tuple[Tensor, ...]:
    """The same as `_gradient`, without a graph: over blocks that fit a cache, in two buffers."""
    of_x, sums = torch.empty_like(x), x.new_zeros(5, *x.shape[:2], dtype=torch.float64)
    for out, of_left, of_slope, of_offset, of_weight, of_bias, g, block, least, a, b, w in blocks(
        of_x, *sums, grad, x, left, slope, offset, weight
    ):
        of_bias.copy_(over_positions(g))
        divisor = torch.mul(block, a).add_(b)
        torch.maximum(divisor, least, out=divisor)
        torch.div(g, divisor, out=out)
        product = torch.mul(out, block)
        of_weight.copy_(over_positions(product))
        # Of the other sign and without the weight, below, too.
        of_divisor = product.div_(divisor)
        of_left.copy_(over_positions(of_divisor))
        # 1 where right is larger: by a sign, which takes a CPU much less time than a comparison.
        of_right = divisor.sub_(least).sign_().mul_(of_divisor)
        of_offset.copy_(over_positions(of_right))
        of_slope.copy_(over_positions(torch.mul(of_right, block, out=of_divisor)))
        out.sub_(of_right.mul_(a)).mul_(w)
    of_left, of_slope, of_offset = -sums[:3] * weight.double().flatten()
    return of_x, of_left - of_offset, of_slope, of_offset, *sums[3:]


def _gradient(
    grad: Tensor, x: Tensor, left: Tensor, slope: Tensor, offset: Tensor, weight: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of x, and by sample those of left, slope, offset, weight and bias.

    Functions of all arguments.
    """
    right = slope * x + offset
    divisor = torch.maximum(right, left)
    direct = grad / divisor
    product = direct * x
    of_divisor = -weight * product / divisor
    of_right = (right - left).relu().sign() * of_divisor
    of_slope, of_offset = over_positions(of_right * x), over_positions(of_right)
    of_left = over_positions(of_divisor) - of_offset
    of_x = weight * direct + of_right * slope
    return of_x, of_left, of_slope, of_offset, over_positions(product), over_positions(grad)
