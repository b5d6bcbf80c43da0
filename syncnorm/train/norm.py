"""Normalisation layers of a model, as the configuration asks for them."""

import functools
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, parametrize

from syncnorm import SyncBatchNorm, SyncBatchRenorm, convert, rng
from syncnorm.errors import ConfigError, InputError, join_first
from syncnorm.family import METHODS, CentredWeight, standardize_weights
from syncnorm.family.layer import FamilyLayer, Pooling
from syncnorm.family.plain import BASELINES, ChannelRMSNorm, Derf, DynamicTanh, NoNorm
from syncnorm.family.standardised import convolutions
from syncnorm.model.convert.adapters import has_torchs_forward, own_class
from syncnorm.module import SyncNorm
from syncnorm.train.config.norm import NormName, NormSection, WeightName
from syncnorm.train.config.section import check_finds
from syncnorm.train.models import NormLayer

_log = logging.getLogger(__name__)


class BatchNorm(nn.BatchNorm2d):
    """torch's batch norm for input (N, C, *S) of any dimension, as our layers take it."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise InputError(
                "`input` must have 2 or more dimensions, (N, C, *S), got shape "
                f"{tuple(input.shape)}"
            )


class FrozenBatchNorm(BatchNorm):
    """A batch norm that only evaluates: statistics, weight and bias never change."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever `mode` is."""
        return super().train(False)


def make_norm_layer(norm: NormSection, total_steps: int, name: NormName | None = None) -> NormLayer:
    """Make a function from a number of channels to a layer.

    Args:
        norm: the layer's name and options.
        total_steps: length of the run, to which renormalisation's default schedule is scaled.
        name: the layer's name, in place of `norm.name`.
    """
    options: dict[str, Any] = {"eps": norm.eps}
    if norm.momentum is not None:
        options["momentum"] = norm.momentum
    match name or norm.name:
        case "batch_norm":
            return partial(BatchNorm, **options)
        case "sync_batch_norm":
            return partial(SyncBatchNorm, sync=norm.sync, **options)
        case "sync_batch_renorm":
            renorm = {
                "schedule": norm.renorm.schedule(total_steps),
                "running_average": norm.renorm.running_average,
            }
            return partial(SyncBatchRenorm, sync=norm.sync, **renorm, **options)
        case "frozen":
            return partial(FrozenBatchNorm, eps=norm.eps)
        case method if method in METHODS:
            return partial(METHODS[method], **(norm.arguments | _own_options(norm, method)))
        case baseline:
            return lambda channels: BASELINES[baseline](channels, norm.eps)


def _own_options(norm: NormSection, method: str) -> dict[str, Any]:
    return norm.options if method == norm.name else {}


# By name, a class that recognises the layers of `make_norm_layer`; those of batch_norm cannot be
# told from torch's own.
_CLASS: dict[NormName, type[nn.Module]] = {
    "batch_norm": nn.Module,
    "sync_batch_norm": SyncNorm,
    "sync_batch_renorm": SyncNorm,
    "frozen": FrozenBatchNorm,
    **dict.fromkeys(METHODS, FamilyLayer),
    "group_norm": nn.GroupNorm,
    "layer_norm": nn.GroupNorm,
    "rms_norm": ChannelRMSNorm,
    "instance_norm": nn.GroupNorm,
    "dynamic_tanh": DynamicTanh,
    "derf": Derf,
    "none": NoNorm,
}
_NORMS = (_BatchNorm, nn.GroupNorm, FamilyLayer, ChannelRMSNorm, DynamicTanh, Derf, NoNorm)


def fit_layers(model: nn.Module, norm: NormSection, total_steps: int) -> None:
    """Replace, in place, the batch norms of a model that makes no layer with `norm_layer`.

    They become ours by `syncnorm.convert`, or are replaced as by a rule. It is logged in a line.

    Raises:
        ConfigError: ours are asked for, and it has no batch norm, or one that cannot become ours.
    """
    found = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, _BatchNorm | _CLASS[norm.name])
    }
    theirs = {name: m for name, m in found.items() if not isinstance(m, _CLASS[norm.name])}
    is_ours = _CLASS[norm.name] in (SyncNorm, FamilyLayer)
    if len(theirs) < len(found):
        local = [name for name, m in theirs.items() if m.training]
        if is_ours and norm.mode.is_pooled and local:
            _log.warning(
                "batch norms that are not made with norm_layer are not pooled: %s",
                join_first(local, 3),
            )
        return
    if not theirs:
        if is_ours:
            raise ConfigError(
                f"`model.name` must give a model with batch norms where norm.name is {norm.name}, "
                "got one that has none. Make its layers with the norm_layer that it is called "
                "with, or set norm.name=batch_norm, which leaves a model as it is."
            )
        return
    if is_ours:
        _convert(model, norm, total_steps)
    else:
        for name, layer in theirs.items():
            _replace(model, name, layer, norm, total_steps, norm.name)
    _log.warning(
        "the model makes no layer with norm_layer: its %d batch norms are %s now",
        len(theirs),
        norm.name,
    )


def warn_of_no_pooling(model: nn.Module, norm: NormSection) -> None:
    """Say in a line if no normalisation layer of a model, ready for training, pools anything."""
    layers = [module for module in model.modules() if isinstance(module, SyncNorm | Pooling)]
    if any(layer.training and layer.is_pooled for layer in layers):
        return
    if not layers:
        cause = f"there is none of syncnorm's (norm.name {norm.name})"
    elif not norm.mode.is_pooled:
        cause = f"norm.sync is {norm.sync}"
    else:
        cause = f"all {len(layers)} of syncnorm's are in evaluation mode"
    _log.warning("no normalisation layer pools its statistics over the workers: %s", cause)


def _convert(
    model: nn.Module,
    norm: NormSection,
    total_steps: int,
    name: NormName | None = None,
    select: Callable[[str, nn.Module], bool] | None = None,
) -> None:
    """Make batch norms layers of this kind, ours or the family's, by `syncnorm.convert`."""
    layer = make_norm_layer(norm, total_steps, name)
    assert isinstance(layer, partial)
    options = dict(layer.keywords)
    is_said = "eps" in _own_options(norm, name or norm.name)
    if norm.eps == NormSection.model_fields["eps"].default and not is_said:
        del options["eps"]  # pretrained weights may want another
    try:
        convert(model, cast("Any", layer.func), select=select, **options)
    except InputError as error:
        raise ConfigError(
            f"`model.name` must give a model that norm.name {name or norm.name} fits: {error}"
        ) from None


def apply_rules(model: nn.Module, norm: NormSection, total_steps: int) -> None:
    """Replace, in place, the layers whose name a rule finds.

    Mode, weight and bias (a zero-initialised one, say) are kept, and so are running statistics,
    which may be pretrained.

    Raises:
        ConfigError: a rule finds no normalisation layer, or one that does more than normalise.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _NORMS)}
    check_finds("norm.rules", norm.rules, layers, "a normalisation layer")
    for name, layer in layers.items():
        kind = _kind(name, norm)
        if kind != norm.name:
            _replace(model, name, layer, norm, total_steps, kind)


def _replace(
    model: nn.Module,
    name: str,
    layer: nn.Module,
    norm: NormSection,
    total_steps: int,
    kind: NormName,
) -> None:
    """Replace a layer by one of this kind, with its parameters and running statistics."""
    cls, channels, is_plain = own_class(layer), getattr(layer, "num_features", 0), True
    if isinstance(layer, nn.GroupNorm):
        channels, is_plain = layer.num_channels, cls.forward is nn.GroupNorm.forward
    elif isinstance(layer, _BatchNorm):
        is_plain = cls in (SyncBatchNorm, SyncBatchRenorm) or has_torchs_forward(cls)
    if not is_plain:
        raise ConfigError(
            f"`norm` must exchange layers that only normalise, got {name!r}, a {cls.__name__}, "
            "whose own forward would be lost. Leave it out of the rules."
        )
    is_frozen = isinstance(layer, FrozenBatchNorm)
    if isinstance(layer, _BatchNorm) and kind in METHODS and not is_frozen:
        _convert(model, norm, total_steps, kind, lambda _, m: m is layer)
        return
    other = make_norm_layer(norm, total_steps, kind)(channels)
    kept = {key: value for key, value in layer.named_parameters() if key in ("weight", "bias")}
    if isinstance(layer, _BatchNorm) and isinstance(other, FamilyLayer):
        with torch.no_grad():
            other.take(layer)
        other.requires_grad_(True)
    elif isinstance(layer, _BatchNorm) and isinstance(other, _BatchNorm):
        kept |= {
            key: b for key, b in layer.named_buffers() if key in ("running_mean", "running_var")
        }
    state = other.state_dict()
    for key in kept.keys() & state.keys():
        state[key].copy_(kept[key].data)
    if not is_frozen:
        other.train(layer.training)
    model.set_submodule(name, other)


def _kind(name: str, norm: NormSection) -> NormName:
    """Find the kind that the first matching rule, or else `norm.name`, gives a layer."""
    for pattern, kind in norm.rules.items():
        if re.search(pattern, name):
            return kind
    return norm.name


def reparametrize(model: nn.Module, weights: WeightName | None) -> None:
    """Have all convolutions of a model compute with weights that are normalised.

    Raises:
        ConfigError: there is no convolution, or one that is parametrized already.
    """
    if weights is None:
        return
    layers = convolutions(model)
    if not layers or any(map(parametrize.is_parametrized, layers)):
        found = "one that is parametrized" if layers else "none"
        raise ConfigError(
            f"`model.name` must have plain convolutions where norm.weights is {weights}, got "
            f"{found}"
        )
    match weights:
        case "weight_norm":
            for layer in layers:
                parametrizations.weight_norm(layer)
        case "spectral_norm":
            for layer in layers:
                parametrizations.spectral_norm(layer)
        case "centred":
            for layer in layers:
                parametrize.register_parametrization(layer, "weight", CentredWeight())
        case "standardized":
            standardize_weights(model)
        case "scaled_standardized":
            # Of a ReLU in front.
            standardize_weights(model, scaled=True, gamma=math.sqrt(2 / (1 - 1 / math.pi)))


class Spectral(NamedTuple):
    """A parameter that torch's spectral norm computes."""

    layer: nn.Module
    name: str
    part: nn.Module
    """The parametrization, which iterates in training whenever the parameter is looked at."""


def spectral_norms(model: nn.Module) -> list[Spectral]:
    """Find the spectral norms of a model."""
    kind = _spectral_norm()
    return [
        Spectral(layer, name, part)
        for layer in filter(parametrize.is_parametrized, model.modules())
        for name, parts in cast("Any", layer).parametrizations.items()
        for part in parts
        if isinstance(part, kind)
    ]


@contextmanager
def power_iterations_held(norms: Sequence[Spectral]) -> Iterator[None]:
    """Have each spectral norm that trains make a power iteration now, and none in the block.

    Else there would be as many as a worker has forwards, or uses a layer in one, and a weight that
    is computed again would be another one.
    """
    held = [each for each in norms if each.part.training]
    with torch.no_grad():
        for layer, name, _ in held:
            getattr(layer, name)
    for each in held:
        each.part.training = False
    try:
        yield
    finally:
        for each in held:
            each.part.training = True


@functools.cache
def _spectral_norm() -> type[nn.Module]:
    # Its name is torch's own.
    with rng.kept(devices=False):
        layer: Any = parametrizations.spectral_norm(nn.Linear(1, 1))
    return type(layer.parametrizations.weight[0])
