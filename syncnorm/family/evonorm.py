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
from syncnorm.family.passes import blocks, channels, per_sample, sample_sums
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
        return _Divide.apply(x, (var + self.eps).sqrt(), slope, offset)  # pyright: ignore[reportReturnType]


class _Divide(torch.autograd.Function):
    """x / max(left, slope x + offset), a function of all of them; left (C,), the others (N, C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
        ctx.save_for_backward(x, left, slope, offset)
        y = torch.empty_like(x)
        for out, *block in blocks(y, x, slope, offset):
            torch.div(block[0], _larger(*block, left)[1], out=out)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, left, slope, offset = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _gradient(grad, x, slope, offset, left)
        grad_x, grad_left = torch.empty_like(x), torch.zeros_like(left)
        grad_slope, grad_offset = torch.empty_like(slope), torch.empty_like(offset)
        for *outs, g, x_block, a, b in blocks(
            grad_x, grad_slope, grad_offset, grad, x, slope, offset
        ):
            of_x, of_left, *others = _gradient(g, x_block, a, b, left)
            grad_left += of_left
            for out, value in zip(outs, (of_x, *others), strict=True):
                out.copy_(value)
        return grad_x, grad_left, grad_slope, grad_offset


def _larger(x: Tensor, slope: Tensor, offset: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """True where slope x + offset is larger than left, and the larger one."""
    right = torch.addcmul(per_sample(offset, x), per_sample(slope, x), x)
    wide = channels(left, x)
    return right > wide, torch.maximum(right, wide)


def _gradient(
    grad: Tensor, x: Tensor, slope: Tensor, offset: Tensor, left: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, left, slope and offset, functions of all arguments."""
    is_right, divisor = _larger(x, slope, offset, left)
    direct = grad / divisor
    of_divisor = -direct * x / divisor
    of_right = of_divisor * is_right
    positions = tuple(range(2, x.ndim))
    of_left = (of_divisor - of_right).sum(positions).double().sum(0)
    of_slope, of_offset = ((t.sum(positions)).double() for t in (of_right * x, of_right))
    return direct + of_right * per_sample(slope, x), of_left, of_slope, of_offset
