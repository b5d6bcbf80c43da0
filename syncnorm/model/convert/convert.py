"""Conversion of whole models: all batch norms, or none and an error."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, TypeVar, overload

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm import tracing
from syncnorm.comm import groups
from syncnorm.errors import InputError
from syncnorm.family.layer import FamilyLayer
from syncnorm.layers import SyncBatchNorm, SyncBatchRenorm
from syncnorm.model.arguments import constructor_arguments
from syncnorm.model.convert import family
from syncnorm.model.convert.class_swap import LazySyncNorm, Request, original_of, swap_back, swap_in
from syncnorm.model.convert.others import (
    home_made,
    is_home_made,
    nothing_to_convert,
    stays_another,
    stays_local,
)
from syncnorm.model.convert.refuse import born_reason, reason, scripted, wrapped
from syncnorm.module import SyncNorm
from syncnorm.statistics.steps import remove_deserted

Select = str | Callable[[str, nn.Module], bool]
_Model = TypeVar("_Model", bound=nn.Module)
_Layer = TypeVar("_Layer", bound=SyncNorm | FamilyLayer)

# Facts of the layer that is converted, not options.
_KEPT = ("num_features", "affine", "bias", "track_running_stats", "device", "dtype")


# A model stays what it is; a batch norm that is the module itself becomes another layer.
@overload
def convert(
    module: _BatchNorm,
    *,
    process_group: groups.Spec = None,
    select: Select | None = None,
    **options: Any,
) -> SyncBatchNorm: ...
@overload
def convert(
    module: _BatchNorm,
    to: type[_Layer],
    *,
    process_group: groups.Spec = None,
    select: Select | None = None,
    **options: Any,
) -> _Layer: ...
@overload
def convert(
    module: _Model,
    to: type[SyncNorm] | type[FamilyLayer] = SyncBatchNorm,
    *,
    process_group: groups.Spec = None,
    select: Select | None = None,
    **options: Any,
) -> _Model: ...
def convert(
    module: nn.Module,
    to: type[SyncNorm] | type[FamilyLayer] = SyncBatchNorm,
    *,
    process_group: groups.Spec = None,
    select: Select | None = None,
    **options: Any,
) -> nn.Module:
    """Make the batch norms of `module` layers of ours, in place; all of them, or none and an error.

    The layers stay the objects that they are, under all their names, with their parameters,
    buffers, hooks, modes and attributes: only their class changes (and `isinstance(layer,
    nn.BatchNorm2d)` with it; `_BatchNorm` remains). So optimizers, ties and references hold, and
    evaluation gives the same bits as before (without running statistics the same to rounding).
    `revert` undoes it.

    Converted are torch's BatchNorm1d/2d/3d, its SyncBatchNorm (whose process group stays unless
    another is given), lazy ones (with their first forward), parametrized ones, subclasses (which
    keep their other methods; with a forward of their own they need `register_adapter`), and our
    layers into one another. Ours take input of 2 or more dimensions, so a check of the number of
    dimensions falls away. InstanceNorm and frozen batch norms that are no subclass of torch's are
    left alone.

    These rules decide what fine-tuning depends on; `print(conversion_table(module))` shows their
    results:

    - momentum: the option; else that of the target's default where batch normalisation becomes
      renormalisation (0.01, as its paper has it) or the reverse (0.1); else what the layer had.
    - the schedule's clock: `num_batches_tracked` begins at 0 where batch normalisation becomes
      renormalisation. The former count is kept aside, and added again by `revert`; it is not in
      state dicts.
    - running statistics, weight, bias, eps: as they are. `running_average="std"` reads
      `running_var` as sigma^2 - eps.
    - layers of ours keep what no option says, but lose what ties them to others: `prepare_ddp`
      comes after `convert`.

    A layer of the family (`syncnorm.family`) is another method, not a batch norm that pools: new
    layers take the places of the old ones. They share weight and bias with them, begin with their
    running statistics, and have eps and a momentum other than its default from them (an OnlineNorm
    keeps its momentum, which is about samples rather than batches), the process group, and the
    `sync` of a layer of ours. Where weight and bias are frozen, all parameters are. Hooks and
    subclasses with methods of their own are refused.

    *Collectives*: none. Every worker must convert alike.

    Args:
        module: a model, or a batch norm; not (part of) what DistributedDataParallel or FSDP has
            wrapped.
        to: SyncBatchNorm, SyncBatchRenorm, or a layer of `syncnorm.family` that takes the place of
            a batch norm.
        process_group: the workers to pool over.
        select: which layers; (qualified name, layer) -> bool, or a regular expression to be found
            in the name. A layer with several names is chosen if one of them is. None: all.
        options: of the target: momentum, eps, sync, and for SyncBatchRenorm schedule,
            running_average; for a layer of the family its own arguments.

    Returns:
        `module`; the new layer, if it is a batch norm that becomes a layer of the family. (The
        table is a function of its own, so that `model = convert(model)` goes on
        working, and so that it can be had later, from a copy or from an unpickled model too.)

    Raises:
        InputError: an option is unknown or breaks its rule, `select` chooses nothing, or a layer
            cannot be converted: it names each, and why. Nothing was changed.

    Warns: UserWarning: there is no batch norm; `select` names layers that another method has taken
        the place of; or layers that are no subclass of torch's batch norms
        keep running statistics, too, and stay local.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> type(convert(model)[1])
        <class 'syncnorm.layers.SyncBatchNorm'>
        >>> type(revert(model)[1])
        <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    _check_target(to, options)
    if issubclass(to, FamilyLayer):
        done = _replace(module, to, process_group, select, options)
        _warn_of_others(done, select, to)
        return done
    request = Request(to, groups.to_handle(process_group), options)
    layers = {
        layer: names
        for layer, names in _select(_named(module), select).items()
        if isinstance(layer, _BatchNorm) and not request.is_met_by(layer)
    }
    faults = scripted(module, lambda name, m: bool(_select({m: [name]}, select, may_be_none=True)))
    faults |= {names[0]: why for layer, names in layers.items() if (why := reason(layer, request))}
    faults |= {names[0]: why for layer, names in layers.items() if (why := wrapped(module, layer))}
    _refuse(faults, "converted")
    for layer, names in layers.items():
        swap_in(layer, names[0], request)
    remove_deserted(module)
    _warn_of_others(module, select, to)
    return module


def _warn_of_others(module: nn.Module, select: Select | None, to: type[nn.Module]) -> None:
    """Warn, in the name of who calls `convert`, of what is left as it was."""
    said = None
    if not callable(select):  # a function is called with batch norms of torch's only
        chosen = _select(_named(module), select, may_be_none=True)
        said = stays_local({names[0]: m for m, names in chosen.items() if is_home_made(m)})
        others = {names[0]: m for m, names in chosen.items() if family.is_another(m, to)}
        if said is None and select is not None and others:
            said = stays_another(others)
    if said is None and not any(isinstance(m, _BatchNorm | to) for m in module.modules()):
        said = nothing_to_convert(module)
    if said is not None:
        warnings.warn(said, stacklevel=3)


def _replace(
    module: nn.Module,
    to: type[FamilyLayer],
    process_group: groups.Spec,
    select: Select | None,
    options: dict[str, Any],
) -> nn.Module:
    """Put layers of the family in the places of batch norms: of all, or of none and an error."""
    layers = {
        layer: names
        for layer, names in _select(_named(module), select).items()
        if isinstance(layer, _BatchNorm)
    }
    faults = scripted(module, lambda name, m: bool(_select({m: [name]}, select, may_be_none=True)))
    faults |= {
        names[0]: why
        for layer, names in layers.items()
        if (why := wrapped(module, layer) or family.own_reason(layer))
    }
    _refuse(faults, "replaced")
    news: dict[nn.Module, FamilyLayer] = {}
    for layer, names in layers.items():
        try:
            news[layer] = family.make(layer, to, process_group, options)
        except InputError as error:
            faults[names[0]] = f"breaks a rule: {error}"
    _refuse(faults, "replaced")
    done = family.put(module, news)
    remove_deserted(done)
    return done


@overload
def convert_sync_batchnorm(module: _BatchNorm, process_group: groups.Spec = None) -> SyncNorm: ...
@overload
def convert_sync_batchnorm(module: _Model, process_group: groups.Spec = None) -> _Model: ...
def convert_sync_batchnorm(module: nn.Module, process_group: groups.Spec = None) -> nn.Module:
    """Under torch's name: make the batch norms of `module` SyncBatchNorm, ours, in place.

    As `convert(module, process_group=process_group)`, except that layers of ours are left alone: a
    switch for synchronised batch norms does not take away renormalisation. Other than torch's, it
    changes a layer that is the module itself, keeps ties, hooks and attributes, and works on CPUs.

    Returns:
        `module`.

    Raises:
        InputError: see `convert`.

    Example:
        >>> type(convert_sync_batchnorm(nn.BatchNorm1d(3))).__name__
        'SyncBatchNorm'
    """
    said = stays_local(home_made(module))
    if said is not None:
        warnings.warn(said, stacklevel=2)
    if not any(isinstance(m, _BatchNorm) and not isinstance(m, SyncNorm) for m in module.modules()):
        return module
    return convert(
        module,
        process_group=process_group,
        select=lambda name, layer: not isinstance(layer, SyncNorm),
    )


@overload
def revert(module: SyncNorm | FamilyLayer, *, to: type[_BatchNorm] | None = None) -> _BatchNorm: ...
@overload
def revert(module: _Model, *, to: type[_BatchNorm] | None = None) -> _Model: ...
def revert(module: nn.Module, *, to: type[_BatchNorm] | None = None) -> nn.Module:
    """Undo `convert`, in place: each layer gets its former class and keeps what it has learnt.

    Running statistics are brought up to date first. Weights, running statistics and hooks stay,
    `num_batches_tracked` has all that was ever counted, momentum and eps are what they were before,
    and nothing of ours is left: state dicts have the keys that they had. It works on copies and on
    unpickled models, too.

    A layer that was built as one of ours was nothing else before, and does not know how many
    dimensions its input has, as torch's classes do: it becomes a `to`. (Where a model needs
    several, revert its parts.)

    A layer of the family becomes a new batch norm that evaluates as it does, with its eps, if there
    is one.

    *Collectives*: none. Every worker must revert alike. To train on under DistributedDataParallel,
    wrap anew.

    Args:
        module: a model or a layer; not (part of) what DistributedDataParallel or FSDP has wrapped.
        to: torch.nn.BatchNorm1d, BatchNorm2d or BatchNorm3d, for layers that were built as ours.

    Returns:
        `module`; the new layer, if it is one of the family.

    Raises:
        InputError: a layer was built as ours and `to` is not given, it is wrapped, or it is one of
            the family that has hooks, or that no batch norm evaluates as. Nothing was changed.

    Example:
        >>> import torch
        >>> layer = convert(nn.BatchNorm1d(1), SyncBatchRenorm)
        >>> _ = layer(torch.tensor([[1.0], [3.0]]))
        >>> revert(layer).running_mean, int(layer.num_batches_tracked)
        (tensor([0.0200]), 1)
    """
    classes = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if to is not None and to not in classes:
        raise InputError(
            f"`to` must be torch.nn.BatchNorm1d, BatchNorm2d or BatchNorm3d, got {to!r}. Pass the "
            "class."
        )
    layers = {
        m: names for m, names in _named(module).items() if isinstance(m, SyncNorm | LazySyncNorm)
    }
    faults = {
        names[0]: why
        for layer, names in layers.items()
        if (why := born_reason(layer, to) or wrapped(module, layer))
    }
    replaced = {m: names for m, names in _named(module).items() if isinstance(m, FamilyLayer)}
    faults |= {
        names[0]: why
        for layer, names in replaced.items()
        if (why := wrapped(module, layer) or family.back_reason(layer, to))
    }
    _refuse(faults, "reverted")
    for layer in layers:
        swap_back(layer, to)
    done = family.put(module, {m: family.make_batch_norm(m, to) for m in replaced})
    remove_deserted(done)
    return done


def conversion_table(module: nn.Module) -> str:
    """Make a table of the converted layers: former class, class, momentum, batches counted.

    Example:
        >>> print(conversion_table(convert(nn.Sequential(nn.BatchNorm1d(3)), SyncBatchRenorm)))
        layer  was          is               momentum     batches counted
        0      BatchNorm1d  SyncBatchRenorm  0.1 -> 0.01  0 before, 0 since: the schedule's clock
    """
    rows = [("layer", "was", "is", "momentum", "batches counted")]
    for layer, names in _named(module).items():
        if isinstance(layer, LazySyncNorm):
            request = layer.pending.request
            momentum = _change(layer.momentum, request.momentum(layer))
            to = f"{request.to.__name__} from its first forward on"
            rows.append((names[0], layer.pending.cls.__name__, to, momentum, "0"))
        elif (original := original_of(layer)) is not None and isinstance(layer, SyncNorm):
            counter = layer.num_batches_tracked
            count = (
                "none" if counter is None else "?" if tracing.is_fake(layer) else str(int(counter))
            )
            if isinstance(layer, SyncBatchRenorm) and not issubclass(original.cls, SyncBatchRenorm):
                count = f"{original.counted} before, {count} since: the schedule's clock"
            momentum = _change(original.changed.get("momentum", layer.momentum), layer.momentum)
            rows.append(
                (" = ".join(names), original.cls.__name__, type(layer).__name__, momentum, count)
            )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    said = stays_local(home_made(module))
    return "\n".join(lines if said is None else [*lines, f"! {said}"])


def _change(before: float | None, after: float | None) -> str:
    return f"{after} as it was" if before == after else f"{before} -> {after}"


def _check_target(to: type[SyncNorm] | type[FamilyLayer], options: dict[str, Any]) -> None:
    """Raise InputError unless `to` can be built with these options."""
    is_family = isinstance(to, type) and issubclass(to, FamilyLayer) and to is not FamilyLayer
    if not is_family and to not in (SyncBatchNorm, SyncBatchRenorm):
        raise InputError(
            "`to` must be SyncBatchNorm, SyncBatchRenorm or a layer of syncnorm.family that takes "
            f"the place of a batch norm, got {to!r}. Pass the class."
        )
    names = constructor_arguments(to).keys() - {"process_group", *_KEPT}
    for name in options.keys() - names:
        if name in _KEPT:
            raise InputError(
                f"`{name}` must not be given to convert, got {options[name]!r}. It stays the "
                "layer's own."
            )
        near = get_close_matches(name, names, 1, 0)
        raise InputError(
            f"`{name}` must be an option of {to.__name__} ({', '.join(sorted(names))}), got "
            f"{options[name]!r}. Did you mean `{near[0]}`?"
        )
    if not issubclass(to, FamilyLayer):  # which may have a rule about the number of channels
        to(1, **options)


def _named(module: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all of its qualified names."""
    named: dict[nn.Module, list[str]] = {}
    for name, m in module.named_modules(remove_duplicate=False):
        named.setdefault(m, []).append(name)
    return named


def _select(
    named: dict[nn.Module, list[str]], select: Select | None, may_be_none: bool = False
) -> dict[nn.Module, list[str]]:
    """The modules of which `select` chooses a name.

    Args:
        may_be_none: modules other than batch norms count too, and it is no error if none is chosen.
    """
    layers = {m: names for m, names in named.items() if may_be_none or isinstance(m, _BatchNorm)}
    if select is None:
        return layers
    if isinstance(select, str):
        try:
            found = re.compile(select).search
        except re.error as error:
            raise InputError(
                f"`select` must be a regular expression, got {select!r}: {error}. Escape special "
                "characters."
            ) from None
        chosen = {m: names for m, names in layers.items() if any(found(name) for name in names)}
    else:
        chosen = {m: names for m, names in layers.items() if any(select(name, m) for name in names)}
    if not chosen and not may_be_none:
        first = f" The first is called {next(iter(layers.values()))[0]!r}." if layers else ""
        raise InputError(
            f"`select` must choose at least one batch norm, got none of {len(layers)} with "
            f"{select!r}.{first}"
        )
    return chosen


def _refuse(faults: dict[str, str], what: str) -> None:
    if faults:
        names_by_reason: dict[str, list[str]] = {}
        for name, why in faults.items():
            names_by_reason.setdefault(why, []).append(name)
        # A reason may be an error of its own, which ends in a full stop.
        listed = "; ".join(
            f"{_first(names)}{why.removesuffix('.')}" for why, names in names_by_reason.items()
        )
        raise InputError(
            f"`module` must hold layers that can be {what}, got {listed}. Nothing was changed."
        )


def _first(names: list[str]) -> str:
    """The first name and the number of the others, as the subject of a clause."""
    if len(names) > 1:
        return f"{names[0]!r} (and {len(names) - 1} more) "
    return f"{names[0]!r} " if names[0] else "itself, which "
