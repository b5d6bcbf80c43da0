"""All public names of `syncnorm`, in one import."""

import syncnorm.functional as functional
import syncnorm.groups as groups
from syncnorm.comm.debug import debug
from syncnorm.layers import SyncBatchNorm, SyncBatchRenorm
from syncnorm.maths.lagged import Lagged
from syncnorm.maths.renorm import RenormSchedule
from syncnorm.model.accumulate import accumulate
from syncnorm.model.adopt import adopt_state_dict
from syncnorm.model.convert.adapters import register_adapter
from syncnorm.model.convert.convert import conversion_table, convert, convert_sync_batchnorm, revert
from syncnorm.model.ddp import prepare_ddp, scale_loss
from syncnorm.model.evaluation import evaluation_statistics
from syncnorm.model.explain import explain
from syncnorm.model.frozen import frozen_statistics
from syncnorm.model.gather import gather
from syncnorm.model.join.join import join
from syncnorm.model.mixed import Mix, Prior
from syncnorm.model.monitor import monitor
from syncnorm.model.norm_parameters import train_only_norms
from syncnorm.model.recalibrate import recalibrate
from syncnorm.model.sampler import ElasticBatchSampler
from syncnorm.model.sharpness import SAM

__all__ = [
    "SAM",
    "ElasticBatchSampler",
    "Lagged",
    "Mix",
    "Prior",
    "RenormSchedule",
    "SyncBatchNorm",
    "SyncBatchRenorm",
    "accumulate",
    "adopt_state_dict",
    "conversion_table",
    "convert",
    "convert_sync_batchnorm",
    "debug",
    "evaluation_statistics",
    "explain",
    "frozen_statistics",
    "functional",
    "gather",
    "groups",
    "join",
    "monitor",
    "prepare_ddp",
    "recalibrate",
    "register_adapter",
    "revert",
    "scale_loss",
    "train_only_norms",
]
