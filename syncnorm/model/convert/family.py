"""Conversion of batch norms into layers of the family, and back: new layers in their places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.utils import parametrize

from syncnorm import tracing
from syncnorm.comm import groups
from syncnorm.errors import InputError
from syncnorm.family import OnlineNorm
from syncnorm.family.layer import FamilyLayer
from syncnorm.layers import SyncBatchNorm, SyncBatchRenorm
from syncnorm.model.convert.adapters import (
    Over,
    has_torchs_forward,
    own_class,
    own_names,
    their_class,
)
from syncnorm.model.convert.class_swap import LazySyncNorm, Original, narrow_statistics, original_of
from syncnorm.model.convert.refuse import busy
from syncnorm.module import SyncNorm

_ORIGINAL = "_syncnorm_original"


class Replaced(NamedTuple):
    """The batch norm that a layer of the family has replaced."""

    cls: type[_BatchNorm]
    momentum: float | None
    counted: int
    """Batches that it had counted."""
    workers: groups.GroupHandle | Literal[False]
    """The process group, if it was torch's SyncBatchNorm; else False."""


def own_reason(layer: _BatchNorm) -> str | None:
    """Find why a batch norm cannot be replaced; None if it can."""
    if isinstance(layer, LazySyncNorm | _LazyNormBase) or parametrize.is_parametrized(layer):
        return "is lazy or parametrized"
    cls = own_class(layer)
    if not isinstance(layer, SyncNorm) and not has_torchs_forward(cls):
        return (
            f"is a {cls.__name__}, whose own forward would be lost; make it a plain batch norm, with "
            "a module behind it for what else it does"
        )
    if "forward" in vars(layer):
        return "has a forward that was set on the instance, which would be lost"
    is_theirs = issubclass(cls, Over) or not isinstance(layer, SyncNorm)
    if not is_theirs and cls not in (SyncBatchNorm, SyncBatchRenorm):
        return f"is a {cls.__name__}, whose own methods would be lost"
    if names := own_names(their_class(layer)):
        return f"is a {cls.__name__}, whose own {', '.join(sorted(names))} would be lost"
    if layer.running_mean is None or layer.running_var is None:
        return "keeps no running statistics"
    if isinstance(layer, SyncNorm) and (why := busy(layer)):
        return why
    return _hooked(layer)


def is_another(layer: nn.Module, to: type[nn.Module]) -> bool:
    """True if a layer took a batch norm's place and is no `to`."""
    return hasattr(layer, _ORIGINAL) and not isinstance(layer, to)


def _hooked(layer: nn.Module) -> str | None:
    """The reason why a layer with hooks stays what it is; None if it has none."""
    # Those of forwards, backwards and state dicts.
    if any(kept for name, kept in vars(layer).items() if name.endswith("_hooks")):
        return "has hooks, which a new layer does not have"
    return None


def make(
    layer: _BatchNorm, to: type[FamilyLayer], process_group: groups.Spec, options: dict[str, Any]
) -> FamilyLayer:
    """Make the layer that takes the place of a batch norm."""
    kept: dict[str, Any] = {"eps": layer.eps}
    if isinstance(layer, SyncNorm):
        layer.settle()
        kept["sync"] = sync = layer.sync_mode.name
        if sync not in ("batch", "none") and "sync" not in options:
            raise InputError(
                f'`sync` must be "batch" or "none" for a method of the family, got {sync!r}. Give '
                "convert one of them"
            )
    if process_group is None:
        process_group = getattr(layer, "process_group", None)
    # A default says nothing about another method's, nor does one for batches about samples.
    default = 0.01 if isinstance(layer, SyncBatchRenorm) else 0.1
    if layer.momentum != default and not issubclass(to, OnlineNorm):
        kept["momentum"] = layer.momentum
    mean = layer.running_mean
    assert mean is not None
    is_affine = layer.weight is not None
    new = to(
        layer.num_features,
        **{**kept, **options},
        affine=is_affine,
        process_group=process_group,
        device=mean.device,
        dtype=layer.weight.dtype if is_affine else mean.dtype,
    )
    with torch.no_grad():
        new.take(layer)
    if is_affine and not any(p.requires_grad for p in layer.parameters(recurse=False)):
        # What a method has besides is frozen as well.
        new.requires_grad_(False)
    setattr(new, _ORIGINAL, _replaced(layer))
    return new.train(layer.training)


def _replaced(layer: _BatchNorm) -> Replaced:
    """The record of a batch norm; of a converted one of what it was before."""
    tracked = layer.num_batches_tracked
    counted = 0 if tracked is None or tracing.is_fake(layer) else int(tracked)
    was = original_of(layer)
    if was is None:
        was = Original(own_class(layer))
        if isinstance(layer, nn.SyncBatchNorm):
            was.workers = groups.to_handle(layer.process_group)
    return Replaced(
        was.cls, was.changed.get("momentum", layer.momentum), was.counted + counted, was.workers
    )


def put(module: nn.Module, news: Mapping[Any, nn.Module]) -> nn.Module:
    """Put new layers in the places of old ones, under all their names; return the module."""
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in news:
                setattr(parent, name, news[child])
    return news.get(module, module)


def back_reason(layer: FamilyLayer, to: type[_BatchNorm] | None) -> str | None:
    """Find why a layer of the family cannot become a batch norm; None if it can."""
    if parametrize.is_parametrized(layer):
        return "is parametrized"
    if layer.as_batch_norm() is None:
        return f"is a {type(layer).__name__}, which no batch norm evaluates as"
    if layer.has_frozen_statistics or layer.chosen is not None:
        return (
            "is used by frozen_statistics or evaluation_statistics; wait for the end of its block"
        )
    was: Replaced | None = getattr(layer, _ORIGINAL, None)
    if to is None and (was is None or issubclass(was.cls, SyncNorm)):
        return "was built as one of ours: `to` must say what it shall be"
    return _hooked(layer)


def make_batch_norm(layer: FamilyLayer, to: type[_BatchNorm] | None) -> _BatchNorm:
    """Make the batch norm of torch's that evaluates as a layer of the family does."""
    layer.settle()
    plain = layer.as_batch_norm()
    assert plain is not None
    was: Replaced | None = getattr(layer, _ORIGINAL, None)
    cls = was.cls if was is not None and not issubclass(was.cls, SyncNorm) else to
    assert cls is not None
    is_affine = plain.weight is not None
    new = cls(
        layer.num_features,
        layer.eps if plain.eps is None else plain.eps,
        layer.momentum if was is None else was.momentum,
        affine=is_affine,
        device=plain.mean.device,
        dtype=plain.mean.dtype,
    )
    with torch.no_grad():
        assert new.running_mean is not None
        assert new.running_var is not None
        assert new.num_batches_tracked is not None
        new.running_mean.copy_(plain.mean)
        new.running_var.copy_(plain.var)
        new.num_batches_tracked.copy_(layer.num_batches_tracked)
        if was is not None:
            new.num_batches_tracked += was.counted
        if plain.weight is not None:
            new.register_parameter("weight", _parameter(plain.weight))
        new.register_parameter("bias", None if plain.bias is None else _parameter(plain.bias))
    narrow_statistics(new)
    if was is not None and was.workers is not False and isinstance(new, nn.SyncBatchNorm):
        new.process_group = groups.to_user(was.workers)
    return new.train(layer.training)


def _parameter(value: torch.Tensor) -> nn.Parameter:
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach())
