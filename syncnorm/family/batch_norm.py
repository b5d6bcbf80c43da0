"""Batch normalisation on the family's moments: the base of methods that add something to it.

    y = (x - mean) / sqrt(var + eps) weight + bias

mean and var, which is biased, are those of a channel over the batch. In evaluation they are the
running ones, which follow the mean and the unbiased variance. arXiv:1502.03167, algorithm 1. A
batch of a single value says nothing about scale, and leaves the running variance alone.

*Collectives*: one all-reduce of 2C+1 numbers, one of 2C in the backward pass.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from syncnorm.comm import groups
from syncnorm.family.layer import FamilyLayer, PlainBatchNorm
from syncnorm.family.pooled import pooled_moments, unbiased


class PooledBatchNorm(FamilyLayer):
    """Batch normalisation over the batches of all workers, with the arguments of `FamilyLayer`.

    For itself `syncnorm.SyncBatchNorm` does the same and more.
    """

    scales_at_once: ClassVar[bool] = True

    def normalize(self, x: Tensor) -> Tensor:
        """Normalise by the batch."""
        count, batch = self.batch_statistics(x, self.group)
        mean, var = batch["mean"], batch["var"]
        self.follow(count, mean=mean, var=unbiased(var, count, self.running_var))
        return self.standardize(x, mean, var)

    def batch_statistics(
        self, x: Tensor, group: groups.Group | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Take a batch's count, and its mean and biased variance, as `mean` and `var`."""
        batch = pooled_moments(x, [None], group, self)
        return batch.count[0], {"mean": batch.mean[0], "var": batch.var[0]}

    def evaluate(self, x: Tensor) -> Tensor:
        """Normalise by the running statistics."""
        return self.standardize(x, self.running_mean, self.running_var)

    def standardize(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Subtract a mean, divide by the root of a variance, both (C,), apply weight and bias."""
        return self.scale(x, mean, (var.double() + self.eps).rsqrt())

    def message_sizes(self) -> list[int]:
        """Count the numbers in each message of a training step, forward, then backward."""
        return [2 * self.num_features + 1, 2 * self.num_features]

    def as_batch_norm(self) -> PlainBatchNorm | None:
        """Find the batch norm that evaluates as this layer does."""
        return PlainBatchNorm(self.running_mean, self.running_var, self.weight, self.bias)
