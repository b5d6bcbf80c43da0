"""Methods of the literature that use statistics of the batch, pooled over the workers.

Each file is one method: which sums travel, what becomes of them. `syncnorm.family.pooled` has sums
and moments over all workers with their gradients, `syncnorm.family.layer` what layers share.
"""

from syncnorm.family.evonorm import EvoNorm
from syncnorm.family.l1 import L1BatchNorm
from syncnorm.family.region import RegionNorm

__all__ = ["EvoNorm", "L1BatchNorm", "RegionNorm"]
