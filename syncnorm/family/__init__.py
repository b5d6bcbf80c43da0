"""Methods of the literature that use statistics of the batch, pooled over the workers.

Each file is one method: which sums travel, what becomes of them. `syncnorm.family.pooled` has sums
and moments over all workers with their gradients, `syncnorm.family.layer` what layers share.
"""

from collections.abc import Callable

from syncnorm.family.evonorm import EvoNorm
from syncnorm.family.l1 import L1BatchNorm
from syncnorm.family.layer import FamilyLayer
from syncnorm.family.region import RegionNorm

__all__ = ["METHODS", "EvoNorm", "L1BatchNorm", "RegionNorm"]

METHODS: dict[str, Callable[..., FamilyLayer]] = {"l1_batch_norm": L1BatchNorm}
"""By name, the methods that take the place of a batch norm: from a number of channels to a layer.

EvoNorm takes an activation's place too, and RegionNorm needs a mask.
"""
