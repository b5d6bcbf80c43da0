"""Batch normalisation by the mean absolute deviation. arXiv:1802.09769.

    s = sqrt(pi / 2) mean |x - mean|        y = (x - mean) / (s + eps) weight + bias

The factor makes s the standard deviation of normal values, so that weights and learning rates of a
batch norm fit. In evaluation mean and s are running averages.

*Collectives*: two all-reduces that depend on each other, of C+1 and C numbers (s needs the mean),
and two in the backward pass.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm import ops
from syncnorm.comm import groups
from syncnorm.family.layer import FamilyLayer, PlainBatchNorm
from syncnorm.family.passes import blocks, by_channel, channels
from syncnorm.family.pooled import pooled_sum

_NORMAL = math.sqrt(math.pi / 2)


class L1BatchNorm(FamilyLayer):
    """Batch normalisation by the mean absolute deviation, over the batches of all workers.

    The buffer `running_deviation` takes the place of a running variance.

    Args:
        num_features: channels C.
        eps: added to the deviation.
        momentum: weight of a batch in the running statistics.
        options: see `FamilyLayer`.
    """

    running_deviation: Tensor
    ones: ClassVar[frozenset[str]] = FamilyLayer.ones | {"running_deviation"}
    scales_at_once: ClassVar[bool] = True

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, **options: Any
    ) -> None:
        super().__init__(num_features, eps, momentum, **options)
        self.register_buffer("running_deviation", torch.ones_like(self.running_var))
        del self.running_var

    def message_sizes(self) -> list[int]:
        channels = self.num_features
        return [channels + 1, channels, channels, channels + 1]

    def take(self, layer: _BatchNorm) -> None:
        super().take(layer)
        if layer.running_var is not None:
            self.running_deviation.copy_(layer.running_var.sqrt())

    def as_batch_norm(self) -> PlainBatchNorm:
        # A batch norm divides by the root of var + eps; here that of (deviation + eps)^2.
        deviation = self.running_deviation.double()
        var = deviation * (deviation + 2 * self.eps)
        return PlainBatchNorm(self.running_mean, var, self.weight, self.bias, self.eps**2)

    def normalize(self, x: Tensor) -> Tensor:
        """Normalise by the batch."""
        count, batch = self.batch_statistics(x, self.group)
        # A single value says nothing about scale.
        known = torch.where(count > 1, batch["deviation"], self.running_deviation)
        self.follow(count, mean=batch["mean"], deviation=known)
        return self._divide(x, **batch)

    def batch_statistics(
        self, x: Tensor, group: groups.Group | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Take what a batch is normalised by: its count, and `mean` and `deviation`."""
        count = torch.full((1,), x.numel() / x.shape[1], dtype=torch.float64, device=x.device)
        total = pooled_sum(torch.cat([_Sums.apply(x), count]), group, self)  # pyright: ignore[reportArgumentType, reportCallIssue]
        count = total[-1].detach()
        mean = total[:-1] / count.clamp(min=1)
        total = pooled_sum(_Deviations.apply(x, mean), group, self)  # pyright: ignore[reportArgumentType]
        return count, {"mean": mean, "deviation": _NORMAL * total / count.clamp(min=1)}

    def evaluate(self, x: Tensor) -> Tensor:
        """Normalise by the running statistics."""
        return self._divide(x, self.running_mean, self.running_deviation)

    def _divide(self, x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
        return self.scale(x, mean, 1 / (deviation.double() + self.eps))


class _Sums(torch.autograd.Function):
    """The sums of x, (C,), float64; a function of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.new_empty(()).expand_as(x)
        return ops.local_sums(x, None).sums[: x.shape[1]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return channels(grad, ctx.x).expand_as(ctx.x)


class _Deviations(torch.autograd.Function):
    """The sums of |x - mean|, (C,), float64; a function of x and mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor) -> Tensor:
        sums = x.new_zeros(2, 1, x.shape[1], dtype=torch.float64)
        for block, centre, signs, deviations in blocks(x, channels(mean, x), *sums):
            centred = block - centre
            signs += by_channel(centred.sign())
            deviations += by_channel(centred.abs_())
        signs, deviations = sums[:, 0].clone()
        ctx.save_for_backward(x, mean, signs)
        return deviations

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mean, signs = ctx.saved_tensors
        centre, factor = channels(mean, x), channels(grad, x)
        if torch.is_grad_enabled():
            return (x - centre).detach().sign() * factor, -grad * signs
        grad_x = torch.empty_like(x)
        for out, block, middle, times in blocks(grad_x, x, centre, factor):
            torch.sub(block, middle, out=out).sign_().mul_(times)
        return grad_x, -grad * signs
