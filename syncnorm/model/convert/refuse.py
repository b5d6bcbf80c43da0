"""Reasons against a conversion, checked in all layers before any is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.parallel import DistributedDataParallel

from syncnorm import checks, undocumented
from syncnorm.comm import groups
from syncnorm.errors import InputError
from syncnorm.layers import SyncBatchNorm, SyncBatchRenorm
from syncnorm.model.convert.adapters import Over, adapter_of, has_torchs_forward, over, own_class
from syncnorm.model.convert.class_swap import LazySyncNorm, Request, original_of
from syncnorm.module import MODE_BUFFERS, SyncNorm
from syncnorm.statistics.buffers import LoadedMark

_SHARDED = "is sharded by FSDP; convert before fully_shard or FullyShardedDataParallel"
_FSDP = ("torch.distributed.fsdp", "torch.distributed._composable")


def reason(layer: _BatchNorm, request: Request) -> str | None:
    """The reason why this layer cannot become that; None if it can."""
    cls = _class_to_be(layer)
    if "forward" in vars(layer):
        return (
            "has a forward that was set on the instance, which would be lost; remove it and set it "
            "again afterwards"
        )
    if isinstance(layer, SyncNorm):
        return busy(layer) or _subclass_of_ours(cls) or _untracked(layer, request)
    if not has_torchs_forward(cls) and adapter_of(cls) is None:
        return (
            f"is a {cls.__qualname__}, whose own forward would be lost; say what it does with "
            f"register_adapter({cls.__name__}, ...)"
        )
    return (
        _untracked(layer, request)
        or _unfit(layer, request)
        or _stale(layer, request)
        or _clash(layer, cls, request)
        or _mismatch(cls, request)
    )


def _class_to_be(layer: _BatchNorm) -> type[Any]:
    """The layer's class; of a lazy layer the one that it becomes."""
    cls = layer.pending.cls if isinstance(layer, LazySyncNorm) else own_class(layer)
    return (
        vars(layer).get("cls_to_become", cls.cls_to_become)
        if issubclass(cls, _LazyNormBase)
        else cls
    )


def busy(layer: SyncNorm) -> str | None:
    """The reason why a layer must stay what it is for now; None if there is none."""
    if layer.statistics.is_busy:
        return (
            "is used by accumulate, evaluation_statistics or recalibrate, or in a step of an "
            "ElasticBatchSampler; wait for the end of the block, or call `advance`"
        )
    return (
        None
        if not layer.has_frozen_statistics
        else "is used by frozen_statistics; wait for the end of its block"
    )


def _stale(layer: _BatchNorm, request: Request) -> str | None:
    try:
        groups.to_handle(request.group(layer))
    except InputError as error:
        return f"has a process group that cannot be used: {error}"
    return None


def _subclass_of_ours(cls: type) -> str | None:
    if cls in (SyncBatchNorm, SyncBatchRenorm) or issubclass(cls, Over):
        return None
    return f"is a {cls.__qualname__}, a subclass of our layers; build the other one instead"


def _untracked(layer: _BatchNorm, request: Request) -> str | None:
    if not issubclass(request.to, SyncBatchRenorm):
        return None
    kept = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
    if layer.track_running_stats and all(each is not None for each in kept):
        return None
    return (
        "has no running statistics, which renormalisation corrects towards; convert it to "
        "SyncBatchNorm"
    )


def _unfit(layer: _BatchNorm, request: Request) -> str | None:
    try:
        channels = 1 if isinstance(layer, _LazyNormBase) else layer.num_features
        checks.check_hyperparameters(
            channels, request.options.get("eps", layer.eps), request.momentum(layer)
        )
    except InputError as error:
        return f"breaks a rule: {error}"
    return None


def _clash(layer: _BatchNorm, cls: type, request: Request) -> str | None:
    """Names of ours that the layer uses for something else."""
    built: nn.Module = request.to(1)  # pyright: ignore[reportCallIssue]
    ours = vars(built).keys() | vars(request.to).keys() | vars(SyncNorm).keys() | MODE_BUFFERS
    # The last is an attribute that transformers sets on every module.
    ours -= {*dir(_BatchNorm), *vars(nn.SyncBatchNorm(1)), LoadedMark.NAME}
    theirs = (
        vars(layer).keys()
        | layer._parameters.keys()
        | layer._buffers.keys()
        | layer._modules.keys()
    )
    for each in cls.__mro__:
        theirs |= set() if each.__module__.startswith("torch.") else vars(each).keys()
    names = sorted(name for name in ours & theirs if not name.startswith("__"))
    return f"has attributes that our layers use, {', '.join(names)}; rename them" if names else None


def _mismatch(cls: type[_BatchNorm], request: Request) -> str | None:
    """The reason why Python refuses to change the class of such an object; None if it does not."""
    try:
        object.__new__(cls).__class__ = over(request.to, cls)
    except TypeError as error:
        return (
            f"is a {cls.__qualname__}, which cannot change its class ({error}); build another one"
        )
    return None


def born_reason(layer: nn.Module, to: type[_BatchNorm] | None) -> str | None:
    """The reason why this layer cannot be reverted; None if it can."""
    if isinstance(layer, LazySyncNorm):
        return None
    assert isinstance(layer, SyncNorm)
    if original_of(layer) is not None:
        return busy(layer)
    if to is None:
        return (
            "was built as ours, so it cannot be known what it should be; pass `to`, such as "
            "torch.nn.BatchNorm2d"
        )
    return busy(layer) or _subclass_of_ours(own_class(layer))


def wrapped(module: nn.Module, layer: nn.Module) -> str | None:
    """The reason why a wrapper around the layer is too early; None if there is none."""
    for m in module.modules():
        if isinstance(m, DistributedDataParallel) and any(layer is each for each in m.modules()):
            return "is in DistributedDataParallel; pass model.module, before wrapping"
        is_fsdp = any(each.__module__.startswith(_FSDP) for each in type(m).__mro__)
        if is_fsdp and any(layer is each for each in m.modules()):
            return _SHARDED
    return _SHARDED if undocumented.is_managed_by_fsdp(layer) else None


def scripted(module: nn.Module, is_selected: Callable[[str, nn.Module], bool]) -> dict[str, str]:
    """The reason why batch norms within a ScriptModule cannot be converted, by name."""
    why = "is compiled by torch.jit; convert before scripting or tracing"
    return {
        name: why
        for name, m in module.named_modules()
        if isinstance(m, torch.jit.ScriptModule) and "BatchNorm" in getattr(m, "original_name", "")
        and is_selected(name, m)
    }  # fmt: skip
