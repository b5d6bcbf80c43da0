"""Region normalisation: the inside and the outside of a mask apart. arXiv:1911.10375, section 3.

    y = sum over the regions R in {mask, 1 - mask} of
        R ((x - mean_R) / sqrt(var_R + eps) (1 + weight_R) + bias_R)

mean_R and var_R are those of a channel over the elements of the region in the batch. They are the
batch's in evaluation, too: there are no running statistics, as what the mask covers changes from
image to image. The authors' code adds eps times the region's share of the elements, an effect of
how it computes the variance; the formula above is the paper's.

*Collectives*: one all-reduce of 2(2C+1) numbers, one of 4C in the backward pass.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from syncnorm import checks
from syncnorm.comm import groups
from syncnorm.family.layer import Pooling
from syncnorm.family.passes import affine
from syncnorm.family.pooled import pooled_moments, widened
from syncnorm.maths.precision import for_sums
from syncnorm.undocumented import disable_dynamo, unseen_by_selective_checkpoint


class RegionNorm(Pooling):
    """Normalisation of two regions of the images of all workers.

    Args:
        num_features: channels C.
        eps: added to variances.
        affine: True for a weight, which begins at 0, and a bias per region and channel, (2, C): of
            the mask first.
        sync, process_group: see `Pooling`.
        device, dtype: of weight and bias.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    num_features: int

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        sync: Literal["batch", "none"] = "batch",
        process_group: groups.Spec = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.check_hyperparameters(num_features, eps, 0.1)
        super().__init__(sync, process_group)
        self.num_features, self.eps = num_features, eps
        for name in ("weight", "bias"):
            value = torch.zeros(2, num_features, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(value) if affine else None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set weight and bias to their initial values, after `to_empty` too."""
        for parameter in self.parameters(recurse=False):
            parameter.zero_()

    def extra_repr(self) -> str:
        """Describe the arguments."""
        is_affine = self.weight is not None
        return f"{self.num_features}, eps={self.eps}, affine={is_affine}, sync={self.sync!r}"

    def message_sizes(self) -> list[int]:
        return [2 * (2 * self.num_features + 1), 4 * self.num_features]

    @unseen_by_selective_checkpoint
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Normalise x.

        Args:
            x: (N, C, *S).
            mask: weights in [0, 1], broadcastable to (N, 1, *S): 1 inside, 0 outside.
                It is constant: it gets no gradient.

        Raises:
            InputError: the mask does not broadcast.
            FaultError: on every worker, if a weight of one of them, or 1 minus it, is negative.
        """
        checks.check_input(x, self.num_features)
        # In a half type the two would not add up to 1.
        inside = for_sums(checks.expand_mask(mask, x))
        regions = (inside, 1 - inside)
        return self._normalize(widened(x), regions).to(x.dtype)

    @disable_dynamo
    @unseen_by_selective_checkpoint
    def _normalize(self, wide: Tensor, regions: tuple[Tensor, Tensor]) -> Tensor:
        batch = pooled_moments(wide, regions, self.group, self)
        y = torch.zeros_like(wide)
        for number, region in enumerate(regions):
            scale, shift = (batch.var[number] + self.eps).rsqrt(), None
            if self.weight is not None and self.bias is not None:
                scale, shift = scale * (1 + self.weight[number]), self.bias[number]
            z = affine(wide, batch.mean[number], scale, shift)
            y = y + region.to(wide.dtype) * z
        return y
