"""Methods of the literature that use statistics of the batch, pooled over the workers.

Each file is one method: which sums travel, what becomes of them. `syncnorm.family.pooled` has sums
and moments over all workers with their gradients, `syncnorm.family.layer` what layers share.
`syncnorm.family.plain` has baselines without batch statistics.
"""

from syncnorm.family.balanced import BalancedBatchNorm, tasks_of
from syncnorm.family.channel import BatchChannelNorm, EstimatedBatchNorm
from syncnorm.family.evonorm import EvoNorm
from syncnorm.family.l1 import L1BatchNorm
from syncnorm.family.membrane import FoldedThreshold, MembranePotentialBatchNorm
from syncnorm.family.momentum import momentum_at
from syncnorm.family.region import RegionNorm
from syncnorm.family.standardised import (
    ScaledWeightStandardization,
    WeightStandardization,
    standardize_weights,
)

__all__ = [
    "BalancedBatchNorm",
    "BatchChannelNorm",
    "EstimatedBatchNorm",
    "EvoNorm",
    "FoldedThreshold",
    "L1BatchNorm",
    "MembranePotentialBatchNorm",
    "RegionNorm",
    "ScaledWeightStandardization",
    "WeightStandardization",
    "momentum_at",
    "standardize_weights",
    "tasks_of",
]
