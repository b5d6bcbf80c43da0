"""Methods of the literature that use statistics of the batch, pooled over the workers.

They take other statistics than a mean and a variance, or have other gradients, so that the path of
`syncnorm.ops` is not theirs. A method is a file with a subclass of `FamilyLayer`, whose docstring
says what to supply: which sums travel, what becomes of them. docs/family.md writes one ("The next
method"), and CONTRIBUTING.md has the steps ("Adding a layer"). What methods share:

    layer.py       `Pooling` and `FamilyLayer`: the group, buffers, forward, evaluation
    pooled.py      sums and moments over all workers, with their gradients
    passes.py      passes over x, with gradients
    batch_norm.py  batch normalisation on these: the base of methods that add to it

and some of them:

    mean_square.py         layers that divide by a root mean square
    surrogate_gradient.py  their gradient, which is no derivative
    window.py              averages over a window of steps, in both passes
    late_sums.py           sums that nobody waits for in their step
    online_recurrence.py   online normalisation's recurrences over samples
    momentum.py            AdaB2N's weight of a batch

`syncnorm.family.plain` has baselines without batch statistics.
"""

from collections.abc import Callable

from syncnorm.family.balanced import BalancedBatchNorm, tasks_of
from syncnorm.family.channel import BatchChannelNorm, EstimatedBatchNorm
from syncnorm.family.evonorm import EvoNorm
from syncnorm.family.l1 import L1BatchNorm
from syncnorm.family.layer import FamilyLayer
from syncnorm.family.mabn import MABN, CentredWeight
from syncnorm.family.membrane import FoldedThreshold, MembranePotentialBatchNorm
from syncnorm.family.momentum import momentum_at
from syncnorm.family.online import OnlineNorm
from syncnorm.family.power import PowerNorm
from syncnorm.family.region import RegionNorm
from syncnorm.family.standardised import (
    ScaledWeightStandardization,
    WeightStandardization,
    standardize_weights,
)
from syncnorm.family.unified import UnifiedNorm

__all__ = [
    "MABN",
    "METHODS",
    "BalancedBatchNorm",
    "BatchChannelNorm",
    "CentredWeight",
    "EstimatedBatchNorm",
    "EvoNorm",
    "FoldedThreshold",
    "L1BatchNorm",
    "MembranePotentialBatchNorm",
    "OnlineNorm",
    "PowerNorm",
    "RegionNorm",
    "ScaledWeightStandardization",
    "UnifiedNorm",
    "WeightStandardization",
    "momentum_at",
    "standardize_weights",
    "tasks_of",
]

METHODS: dict[str, Callable[..., FamilyLayer]] = {
    "batch_channel_norm": BatchChannelNorm,
    "estimated_batch_norm": EstimatedBatchNorm,
    "l1_batch_norm": L1BatchNorm,
    "mabn": MABN,
    "online_norm": OnlineNorm,
    "power_norm": PowerNorm,
    "unified_norm": UnifiedNorm,
}
"""The methods that take the place of a batch norm, by name: from a number of channels to a layer.

Others take an activation's place too (EvoNorm), or need more than x: a mask (RegionNorm), tasks
(BalancedBatchNorm), time steps (MembranePotentialBatchNorm).
"""
