"""EvoNorm-B0, B1 and B2: normalisation and activation in one layer. arXiv:2004.02967, table 1.

    B0:  z = x / max(sqrt(var + eps), v x + sqrt(var_nchw + eps))
    B1:  z = x / max(sqrt(var + eps), (x + 1) rms_nchw)
    B2:  z = x / max(sqrt(var + eps), rms_nchw - x)
    y = z weight + bias

var is the biased variance of a channel over the batch, var_nchw that of a sample's channel over its
positions, rms_nchw the root of the mean of its squares plus eps; v is a parameter per channel. In
evaluation var is the running variance, which follows the unbiased one. No mean is subtracted.

*Collectives*: one all-reduce of 2C+1 numbers, one of 2C in the backward pass.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from syncnorm.comm import groups
from syncnorm.errors import InputError
from syncnorm.family.layer import FamilyLayer
from syncnorm.family.pooled import channels, pooled_moments, unbiased
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
        return [2 * self.num_features + 1, 2 * self.num_features]

    def check(self, x: Tensor) -> None:
        """Raise InputError for an input without positions, before any exchange."""
        super().check(x)
        if x.ndim < 3:
            raise InputError(f"`x` must have positions, (N, C, *S), got shape {tuple(x.shape)}")

    @disable_dynamo
    def normalize(self, x: Tensor) -> Tensor:
        """Normalise by the batch."""
        count, batch = self.batch_statistics(x, self.group)
        self.follow(count, var=unbiased(batch["var"], count, self.running_var))
        return self._divide(x, batch["var"])

    def batch_statistics(
        self, x: Tensor, group: groups.Group | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Take what a batch is normalised by: its count, and its biased variance as `var`."""
        batch = pooled_moments(x, [None], group, self)
        return batch.count[0], {"var": batch.var[0]}

    def evaluate(self, x: Tensor) -> Tensor:
        """Normalise by the running variance."""
        return self._divide(x, self.running_var)

    def _divide(self, x: Tensor, var: Tensor) -> Tensor:
        positions = tuple(range(2, x.ndim))
        if self.v is not None:
            spread = x.var(positions, unbiased=False, keepdim=True)
            other = channels(self.v, x) * x + (spread + self.eps).sqrt()
        else:
            rms = (x.square().mean(positions, keepdim=True) + self.eps).sqrt()
            other = (x + 1) * rms if self.variant == "b1" else rms - x
        return x / torch.maximum(channels((var + self.eps).sqrt(), x), other)
