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
from syncnorm.family.pooled import pooled_sum, unbiased
from syncnorm.undocumented import disable_dynamo


class EvoNorm(FamilyLayer):
    """EvoNorm-B0, B1 or B2 over the batches of all workers; needs positions, (N, C, *S).

    It takes the place of a norm and the activation behind it.

    Args:
        num_features: channels C.
        variant: "b0", "b1" or "b2".
        eps: added to variances and mean squares.
        momentum: weight of a batch in the running variance.
        options: see `FamilyLayer`.
    """

    v: Tensor | None
    ones: ClassVar[frozenset[str]] = FamilyLayer.ones | {"v"}

    def __init__(
        self,
        num_features: int,
        variant: Literal["b0", "b1", "b2"] = "b0",
        eps: float = 1e-5,
        momentum: float = 0.1,
        **options: Any,
    ) -> None:
        if variant not in ("b0", "b1", "b2"):
            raise InputError(f'`variant` must be "b0", "b1" or "b2", got {variant!r}')
        super().__init__(num_features, eps, momentum, **options)
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

    @disable_dynamo
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
        # Rounding may leave less than nothing.
        return total[-1].detach(), (square - mean.square()).clamp(min=0)

    def evaluate(self, x: Tensor) -> Tensor:
        """Normalise by the running variance."""
        return self._divide(x, sample_sums(x), self.running_var)

    def _divide(self, x: Tensor, sums: Tensor, var: Tensor) -> Tensor:
        mean, square = sums / math.prod(x.shape[2:])  # of samples, (N, C)
        if self.v is not None:
            # Rounding may leave less than nothing.
            slope = self.v.double().expand_as(mean)
            offset = ((square - mean.square()).clamp(min=0) + self.eps).sqrt()
        else:
            offset = (square + self.eps).sqrt()
            slope = offset if self.variant == "b1" else torch.full_like(offset, -1)
        left = channels((var.double() + self.eps).sqrt(), x)
        return _Divide.apply(x, left, per_sample(slope, x), per_sample(offset, x))  # pyright: ignore[reportReturnType]


class _Divide(torch.autograd.Function):
    """x / max(left, slope x + offset), a function of all of them.

    left is (1, C, 1, ...), slope and offset are (N, C, 1, ...), in the type of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
        ctx.save_for_backward(x, left, slope, offset)
        y = torch.empty_like(x)
        for out, block, least, a, b in blocks(y, x, left, slope, offset):
            torch.maximum(torch.mul(block, a, out=out).add_(b), least, out=out)
            torch.div(block, out, out=out)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, left, slope, offset = ctx.saved_tensors
        gradient = _gradient if torch.is_grad_enabled() else _gradient_in_blocks
        of_x, *others = gradient(grad, x, left, slope, offset)
        of_left, of_slope, of_offset = (per_sample(each, x) for each in others)
        return of_x, of_left.sum(0, keepdim=True), of_slope, of_offset


def _gradient_in_blocks(
    grad: Tensor, x: Tensor, left: Tensor, slope: Tensor, offset: Tensor
) -> tuple[Tensor, ...]:
    """As `_gradient`, whose names it has, without a graph: over blocks in a cache, in two buffers."""
    of_x, sums = torch.empty_like(x), x.new_zeros(3, *x.shape[:2], dtype=torch.float64)
    for out, of_left, of_slope, of_offset, g, block, least, a, b in blocks(
        of_x, *sums, grad, x, left, slope, offset
    ):
        divisor = torch.mul(block, a).add_(b)
        torch.maximum(divisor, least, out=divisor)
        torch.div(g, divisor, out=out)
        # Of the other sign, below, too.
        of_divisor = torch.mul(out, block).div_(divisor)
        of_left.copy_(over_positions(of_divisor))
        of_right = divisor.sub_(least).sign_().mul_(of_divisor)
        of_offset.copy_(over_positions(of_right))
        of_slope.copy_(over_positions(torch.mul(of_right, block, out=of_divisor)))
        out.sub_(of_right.mul_(a))
    of_left, of_slope, of_offset = -sums
    return of_x, of_left - of_offset, of_slope, of_offset


def _gradient(
    grad: Tensor, x: Tensor, left: Tensor, slope: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, and of left, slope and offset by sample; functions of all arguments."""
    right = slope * x + offset
    divisor = torch.maximum(right, left)
    direct = grad / divisor
    of_divisor = -direct * x / divisor
    # 1 where right is larger: by a sign, which takes a CPU much less time than a comparison.
    of_right = (right - left).relu().sign() * of_divisor
    of_slope, of_offset = over_positions(of_right * x), over_positions(of_right)
    of_left = over_positions(of_divisor) - of_offset
    return direct + of_right * slope, of_left, of_slope, of_offset
