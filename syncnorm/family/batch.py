"""Batch normalisation on the family's moments: the base of methods that add something to it.

    y = (x - mean) / sqrt(var + eps) weight + bias

mean and var, which is biased, are those of a channel over the batch. In evaluation they are the
running ones, which follow the mean and the unbiased variance. arXiv:1502.03167, algorithm 1. A
batch of a single value says nothing about scale, and leaves the running variance alone.

*Collectives*: one all-reduce of 2C+1 numbers, one of 2C in the backward pass.
"""

from __future__ import annotations

from torch import Tensor

from syncnorm.family.layer import FamilyLayer, PlainBatchNorm
from syncnorm.family.pooled import channels, pooled_moments, unbiased


class PooledBatchNorm(FamilyLayer):
    """Batch normalisation over the batches of all workers, with the arguments of `FamilyLayer`.

    For itself `syncnorm.SyncBatchNorm` does the same and more.
    """

    def normalize(self, x: Tensor) -> Tensor:
        """Normalise by the batch."""
        batch = pooled_moments(x, [None], self.group, self.label)
        (mean,), (var,), (count,) = batch.mean, batch.var, batch.count
        self.follow(count, mean=mean, var=unbiased(var, count, self.running_var))
        return self.standardize(x, mean, var)

    def evaluate(self, x: Tensor) -> Tensor:
        """Normalise by the running statistics."""
        return self.standardize(x, self.running_mean, self.running_var)

    def standardize(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Subtract a mean and divide by the root of a variance, both (C,)."""
        return (x - channels(mean, x)) * channels((var + self.eps).rsqrt(), x)

    def message_sizes(self) -> list[int]:
        """Count the numbers in each message of a training step, forward, then backward."""
        return [2 * self.num_features + 1, 2 * self.num_features]

    def as_batch_norm(self) -> PlainBatchNorm | None:
        """Find the batch norm that evaluates as this layer does."""
        return PlainBatchNorm(self.running_mean, self.running_var, self.weight, self.bias)
