"""Baselines without batch statistics that torch does not have; nothing here is exchanged.

`BASELINES` has those that take the place of a batch norm, torch's among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from syncnorm.family.plain.clipping import clip_gradients_adaptively_
from syncnorm.family.plain.derf import Derf
from syncnorm.family.plain.dynamic_tanh import DynamicTanh
from syncnorm.family.plain.fixup import ScalarBias, ScalarScale, fixup_
from syncnorm.family.plain.rms import ChannelRMSNorm

__all__ = [
    "BASELINES",
    "ChannelRMSNorm",
    "Derf",
    "DynamicTanh",
    "NoNorm",
    "ScalarBias",
    "ScalarScale",
    "clip_gradients_adaptively_",
    "fixup_",
]


class NoNorm(nn.Identity):
    """No normalisation, in the place of a layer of this number of channels."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


BASELINES: dict[str, Callable[[int, float], nn.Module]] = {
    "group_norm": lambda channels, eps: nn.GroupNorm(math.gcd(32, channels), channels, eps),
    # All values of a sample together, with a weight and a bias per channel.
    "layer_norm": lambda channels, eps: nn.GroupNorm(1, channels, eps),
    # The channels of a position.
    "rms_norm": ChannelRMSNorm,
    # The positions of a channel, for input of any dimension, with weight and bias.
    "instance_norm": lambda channels, eps: nn.GroupNorm(channels, channels, eps),
    "dynamic_tanh": lambda channels, eps: DynamicTanh(channels),
    "derf": lambda channels, eps: Derf(channels),
    "none": lambda channels, eps: NoNorm(channels),
}
"""Makers by name: from a number of channels and an eps to a layer for input (N, C, *S)."""
