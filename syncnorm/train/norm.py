"""From the configuration to normalisation layers."""

from functools import partial
from typing import Any

from torch import nn

from syncnorm import SyncBatchNorm, SyncBatchRenorm
from syncnorm.train.config import NormSection
from syncnorm.train.models import NormLayer


def make_norm_layer(norm: NormSection, total_steps: int) -> NormLayer:
    """Return what makes a layer from a number of channels.

    Args:
        norm: which layer, and its options.
        total_steps: length of the run, to which renormalisation's default schedule is scaled.
    """
    options: dict[str, Any] = {"eps": norm.eps}
    if norm.momentum is not None:
        options["momentum"] = norm.momentum
    match norm.name:
        case "batch_norm":
            return partial(nn.BatchNorm2d, **options)
        case "sync_batch_norm":
            return partial(SyncBatchNorm, sync=norm.sync, **options)
        case "sync_batch_renorm":
            renorm = {"schedule": norm.renorm.schedule(total_steps), "running_average": norm.renorm.running_average}
            return partial(SyncBatchRenorm, sync=norm.sync, **renorm, **options)
