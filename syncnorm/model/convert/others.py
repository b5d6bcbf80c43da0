"""Warnings and errors about batch norms of a model that are not ours."""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from syncnorm.errors import InputError, join_first
from syncnorm.family.layer import FamilyLayer, Pooling
from syncnorm.model.convert.class_swap import LazySyncNorm
from syncnorm.module import SyncNorm

# Names of buffers by which home-made layers are recognised: one of a mean, and one of a scale.
_MEANS = {"running_mean", "moving_mean", "ra_mean"}
_SCALES = {
    f"{prefix}_{name}"
    for prefix in ("running", "moving")
    for name in ("var", "variance", "std", "stddev")
}
_SCALES |= {"ra_var"}
# By the first class that fits, what makes a layer ours, or keeps it without statistics.
_REMEDIES = {
    LazySyncNorm: "Lazy ones are converted in their first forward: call the model once.",
    _BatchNorm: "convert(model) makes torch's batch norms layers of ours.",
    _InstanceNorm: "Instance norms keep no statistics with track_running_stats=False.",
}


def is_home_made(layer: nn.Module) -> bool:
    """True if a layer that is no batch norm of torch's keeps running statistics of batches."""
    return _has_statistics(layer) and not _only_applies(layer)


def is_frozen(layer: nn.Module) -> bool:
    """True if a layer that is no batch norm of torch's applies statistics of batches, as it has them."""
    return _has_statistics(layer) and _only_applies(layer)


def _has_statistics(layer: nn.Module) -> bool:
    if isinstance(layer, _NormBase | Pooling) or type(layer).__module__.startswith(
        ("torch.nn.", "torch.ao.")
    ):
        return False
    buffers = {name for name, _ in layer.named_buffers(recurse=False)}
    return not buffers.isdisjoint(_MEANS) and not buffers.isdisjoint(_SCALES)


def _only_applies(layer: nn.Module) -> bool:
    """True if its weight is a buffer, or its name says "frozen"."""
    is_buffer = any(name == "weight" for name, _ in layer.named_buffers(recurse=False))
    return is_buffer or "frozen" in kind_of(layer).lower()


def has_own_forward(layer: nn.Module) -> bool:
    """True if a batch norm does not run torch's forward, but its class's or instance's own."""
    theirs = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return type(layer).forward not in theirs or "forward" in vars(layer)


def kind_of(layer: nn.Module) -> str:
    """The name of a layer's class, also where torch.jit has compiled it."""
    return getattr(layer, "original_name", type(layer).__name__)


def home_made(model: nn.Module) -> dict[str, nn.Module]:
    """The home-made layers of `model`, by name."""
    return {name: m for name, m in model.named_modules() if is_home_made(m)}


def stays_local(layers: dict[str, nn.Module]) -> str | None:
    """The warning about home-made layers; None if there are none."""
    if not layers:
        return None
    return (
        f"`model` keeps running statistics in layers of its own, {listed(layers)}: convert leaves "
        "them alone, each worker has statistics of its own batches, and DistributedDataParallel "
        "overwrites them with rank 0's unless it is told not to. Build such layers on "
        "torch.nn.BatchNorm1d, 2d or 3d, or on syncnorm.functional.sync_batch_norm."
    )


def stays_another(layers: dict[str, nn.Module]) -> str:
    """The warning about layers of the family that a conversion to something else passes over."""
    return (
        f"`module` has layers of syncnorm.family, {listed(layers)}, which stay what they are: nothing "
        "of them was converted. revert(module), with `to` if they were built so, makes them batch "
        "norms."
    )


def nothing_to_convert(model: nn.Module) -> str:
    """The warning about a model without a batch norm."""
    family = family_of(model)
    if family:
        return stays_another(family)
    frozen = {name: m for name, m in model.named_modules() if is_frozen(m)}
    of_frozen = (
        f" Its layers {listed(frozen)} apply running statistics and never update them: build the "
        "model with norm_layer=SyncBatchNorm to train such layers."
        if frozen
        else ""
    )
    return f"`module` has no batch norm: nothing was converted.{of_frozen}"


def check_covers(model: nn.Module, what: str, *, acts_on_family: bool) -> None:
    """Check that `what`, which acts on our layers only, leaves out no other training statistics.

    Args:
        acts_on_family: True if it acts on layers of the family, too.

    Raises:
        InputError: there is no layer of ours, and there are others that training forwards would
            update.

    Warns:
        UserWarning: there are both.
    """
    others = {
        name: m
        for name, m in model.named_modules()
        if m.training and (_updates(m) or is_home_made(m)) and not isinstance(m, SyncNorm)
    }
    kinds = {next((k for k in _REMEDIES if isinstance(m, k)), _BatchNorm) for m in others.values()}
    remedy = " ".join(words for kind, words in _REMEDIES.items() if kind in kinds)
    family = {} if acts_on_family else {n: m for n, m in family_of(model).items() if m.training}
    if family:
        others |= family
        remedy = f"Methods of syncnorm.family know no {what}; SyncBatchNorm and SyncBatchRenorm do."
    if not others:
        return
    ours = SyncNorm | Pooling if acts_on_family else SyncNorm
    if not any(isinstance(m, ours) for m in model.modules()):
        raise InputError(
            f"`model` must have layers of ours for {what}, got only {listed(others)}. {remedy}"
        )
    warnings.warn(
        f"{what} leaves out layers of `model` that are no batch norms of ours: {listed(others)}. "
        f"Their running statistics follow every training forward. {remedy}",
        stacklevel=4,
    )


def family_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of the family that keep running statistics, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FamilyLayer)}


def listed(layers: dict[str, nn.Module]) -> str:
    """Names and classes of layers, for a sentence."""
    named = [
        f"{name!r} ({kind_of(m)})" if name else f"a {kind_of(m)} itself"
        for name, m in layers.items()
    ]
    return join_first(named, 6)


def _updates(layer: nn.Module) -> bool:
    """True if a batch or instance norm of torch's, or a lazy one, moves running statistics."""
    if isinstance(layer, LazySyncNorm):
        return True
    return (
        isinstance(layer, _NormBase)
        and layer.track_running_stats
        and layer.running_mean is not None
    )
