"""From the configuration to normalisation layers."""

from functools import partial

from torch import nn

from syncnorm import SyncBatchNorm
from syncnorm.train.config import NormSection
from syncnorm.train.models import NormLayer


def make_norm_layer(norm: NormSection) -> NormLayer:
    """Return what makes a layer from a number of channels."""
    if norm.name == "batch_norm":
        return partial(nn.BatchNorm2d, eps=norm.eps, momentum=norm.momentum)
    return partial(SyncBatchNorm, eps=norm.eps, momentum=norm.momentum, sync=norm.sync)
