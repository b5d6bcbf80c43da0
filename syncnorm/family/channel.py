"""Batch norm by estimates, and batch-channel normalisation. arXiv:1903.10520.

Estimated batch norm, for batches that are too small to tell a variance:

    mean <- mean + s (mean_B - mean)        var <- var + s (E_B (x - mean)^2 - var)
    y = (x - mean) / sqrt(var + eps) weight + bias

E_B is an average over the batch, mean_B that of x. The deviations are from the estimate as it was
before the batch. What normalises is the estimate that has followed the batch, so the forward waits
for its message. The estimates are constants in the backward pass. s is `momentum`: in the authors'
code the training loop sets it, so set the attribute as you go.

Batch-channel normalisation is a batch norm (or an estimated one), with its weight and bias, and
then a normalisation of groups of channels within each sample, with a weight and a bias per group:

    z = batch norm of x        y = (z - mean_g) / sqrt(var_g + eps) group_weight + group_bias

mean_g and var_g are those of a sample's group of channels over all their positions.

*Collectives*: the batch norm sends 2C+1 numbers, and 2C in the backward pass; with estimates the
latter is not sent. Groups of channels lie within a worker.

Sources: the paper; github.com/joe-siyuan-qiao/Batch-Channel-Normalization, whose steps and their
order are followed for estimates. With batch statistics the running variance follows the unbiased
one, as torch's does.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from syncnorm.errors import InputError
from syncnorm.family.batch_norm import PooledBatchNorm
from syncnorm.family.passes import affine
from syncnorm.family.pooled import pooled_moments
from syncnorm.statistics import repeated


class EstimatedBatchNorm(PooledBatchNorm):
    """Batch normalisation by running estimates, in training as in evaluation, over all workers.

    Args:
        num_features: channels C.
        eps: added to variances.
        momentum: weight s of a batch in the estimates; may be set anew at any step, to the same on
            all workers.
        options: see `FamilyLayer`.
    """

    def normalize(self, x: Tensor) -> Tensor:
        """Have the estimates follow the batch, and normalise by them."""
        return by_estimates(self, x)

    def message_sizes(self) -> list[int]:
        """Count the numbers in each message of a training step."""
        return super().message_sizes()[:1]


class BatchChannelNorm(PooledBatchNorm):
    """A batch norm over all workers, then a normalisation of groups of channels.

    Args:
        num_features: channels C.
        num_groups: groups of channels; None: 32, or the largest divisor of 32 that divides C. A
            group of a single value, as on (N, C) with C groups, is 0 once it is normalised.
        estimate: True for the estimated batch norm, False for batch statistics.
        eps: added to variances, of the batch and of groups.
        momentum: weight of a batch in the running statistics; see `EstimatedBatchNorm`.
        options: see `FamilyLayer`.
    """

    group_weight: Tensor | None
    group_bias: Tensor | None
    estimate: bool
    num_groups: int
    ones: ClassVar[frozenset[str]] = PooledBatchNorm.ones | {"group_weight"}

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = None,
        estimate: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, **options)
        if num_groups is None:
            num_groups = math.gcd(32, num_features)
        if num_groups < 1 or num_features % num_groups:
            raise InputError(
                f"`num_groups` must divide num_features = {num_features}, got {num_groups}. Leave "
                "it out for a divisor of 32."
            )
        self.num_groups, self.estimate = num_groups, estimate
        for name, like in (("group_weight", self.weight), ("group_bias", self.bias)):
            value = None if like is None else nn.Parameter(like.detach()[:num_groups].clone())
            self.register_parameter(name, value)

    def normalize(self, x: Tensor) -> Tensor:
        """Normalise by the batch or by estimates."""
        return by_estimates(self, x) if self.estimate else super().normalize(x)

    def finish(self, z: Tensor) -> Tensor:
        """Normalise groups of channels, and apply their weight and bias."""
        # Not by the function of torch.nn, which raises on a worker that has a single value. And not
        # as channels last: torch's kernel for a CPU loses the variance there at a large mean.
        dense = torch.group_norm(z.contiguous(), self.num_groups, eps=self.eps)
        z = dense if z.is_contiguous() else torch.empty_like(z).copy_(dense)
        width = self.num_features // self.num_groups
        weight, bias = (
            None if each is None else each.repeat_interleave(width)
            for each in (self.group_weight, self.group_bias)
        )
        return affine(z, None, weight, bias)

    def message_sizes(self) -> list[int]:
        """Count the numbers in each message of a training step."""
        return super().message_sizes()[:1] if self.estimate else super().message_sizes()

    def as_batch_norm(self) -> None:
        """Say that there is no batch norm that evaluates as this layer does."""

    def extra_repr(self) -> str:
        """Describe the arguments."""
        return f"{super().extra_repr()}, num_groups={self.num_groups}, estimate={self.estimate}"


def by_estimates(layer: PooledBatchNorm, x: Tensor) -> Tensor:
    """Have a layer's running statistics follow the batch, and normalise by them."""
    batch = pooled_moments(x.detach(), [None], layer.group, layer)
    (mean,), (var,), (count,) = batch.mean, batch.var, batch.count
    # E_B (x - estimate)^2, from moments about the batch's own mean.
    about_estimate = var + (mean - layer.running_mean).square()
    values = {"mean": mean, "var": about_estimate}
    layer.follow(count, **values)
    if layer.looks_ahead:
        return layer.standardize(x, **layer.moved(count, **values))
    # A repeated forward finds estimates that have moved on.
    seen = repeated.same(layer, lambda: (layer.running_mean.clone(), layer.running_var.clone()))
    return layer.standardize(x, *seen)
