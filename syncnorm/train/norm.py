"""From the configuration to normalisation layers."""

import math
import re
from functools import partial
from typing import Any, Self

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm import SyncBatchNorm, SyncBatchRenorm
from syncnorm.errors import ConfigError
from syncnorm.train.config_norm import NormName, NormSection
from syncnorm.train.models import NormLayer


class FrozenBatchNorm(nn.BatchNorm2d):
    """A batch norm that only ever evaluates: its statistics never change, and weight and bias are not trained."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever is asked for."""
        return super().train(False)


def make_norm_layer(norm: NormSection, total_steps: int, name: NormName | None = None) -> NormLayer:
    """Return what makes a layer from a number of channels.

    Args:
        norm: which layer, and its options.
        total_steps: length of the run, to which renormalisation's default schedule is scaled.
        name: which layer instead of `norm.name`.
    """
    options: dict[str, Any] = {"eps": norm.eps}
    if norm.momentum is not None:
        options["momentum"] = norm.momentum
    match name or norm.name:
        case "batch_norm":
            return partial(nn.BatchNorm2d, **options)
        case "sync_batch_norm":
            return partial(SyncBatchNorm, sync=norm.sync, **options)
        case "sync_batch_renorm":
            renorm = {"schedule": norm.renorm.schedule(total_steps), "running_average": norm.renorm.running_average}
            return partial(SyncBatchRenorm, sync=norm.sync, **renorm, **options)
        case "group_norm":
            return lambda channels: nn.GroupNorm(math.gcd(32, channels), channels, eps=norm.eps)
        case "frozen":
            return partial(FrozenBatchNorm, eps=norm.eps)


def apply_rules(model: nn.Module, norm: NormSection, total_steps: int) -> None:
    """Exchange layers whose name a rule finds, in place; mode, weight and bias (a zero-initialised one, say) are kept.

    Raises:
        ConfigError: a rule finds no normalisation layer.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm | nn.GroupNorm)}
    for pattern in norm.rules:
        if not any(re.search(pattern, name) for name in layers):
            raise ConfigError(
                f"`norm.rules` must each find a normalisation layer, got {pattern!r}. "
                f"The layers are {', '.join(layers)}."
            )
    for name, layer in layers.items():
        kind = _kind(name, norm)
        if kind != norm.name:
            channels = layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.num_features
            other = make_norm_layer(norm, total_steps, kind)(channels)
            for key, value in layer.named_parameters():
                other.get_parameter(key).data.copy_(value.data)
            if not isinstance(layer, FrozenBatchNorm):
                other.train(layer.training)
            model.set_submodule(name, other)


def _kind(name: str, norm: NormSection) -> NormName:
    """What the layer of this name is to be."""
    for pattern, kind in norm.rules.items():
        if re.search(pattern, name):
            return kind
    return norm.name
