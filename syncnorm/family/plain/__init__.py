"""Baselines without batch statistics that torch does not have; nothing here is exchanged.

`BASELINES` has those that take the place of a batch norm, torch's among them: from a number of
channels to a layer for input (N, C, *S).
"""

from __future__ import annotations

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
    "ScalarBias",
    "ScalarScale",
    "clip_gradients_adaptively_",
    "fixup_",
]

BASELINES: dict[str, Callable[[int], nn.Module]] = {
    # All values of a sample together, with a weight and a bias per channel.
    "layer_norm": lambda channels: nn.GroupNorm(1, channels),
    # The channels of a position.
    "rms_norm": ChannelRMSNorm,
    # The positions of a channel, for input of any dimension, with weight and bias.
    "instance_norm": lambda channels: nn.GroupNorm(channels, channels),
    "dynamic_tanh": DynamicTanh,
    "derf": Derf,
    "none": lambda channels: nn.Identity(),
}
