"""syncnorm trains a sharded batch as if it were one batch."""

from syncnorm import functional
from syncnorm.comm.guard import debug
from syncnorm.layers import SyncBatchNorm, SyncBatchRenorm
from syncnorm.maths.lagged import Lagged
from syncnorm.maths.renorm import RenormSchedule
from syncnorm.model.accumulate import accumulate
from syncnorm.model.ddp import prepare_ddp, scale_loss
from syncnorm.model.frozen import frozen_statistics
from syncnorm.model.join import join
from syncnorm.model.monitor import monitor
from syncnorm.model.recalibrate import recalibrate

__all__ = [
    "Lagged",
    "RenormSchedule",
    "SyncBatchNorm",
    "SyncBatchRenorm",
    "accumulate",
    "debug",
    "frozen_statistics",
    "functional",
    "join",
    "monitor",
    "prepare_ddp",
    "recalibrate",
    "scale_loss",
]
__version__ = "0.1.0"
