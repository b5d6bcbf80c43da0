"""State dicts of other libraries, read into a model whose batch norms may be ours.

The entries of each batch norm are recognised by their names:

| entries | of | become |
|---|---|---|
| running_mean, running_var | torch, apex, mmcv, timm, our layers | the same |
| the same | inplace_abn (must be named) | weight = abs(weight) + eps |
| moving_mean, moving_variance, gamma, beta | Keras | the same statistics, weight, bias |
| moving_mean, moving_stddev, gamma, beta | Keras, renorm=True | running_var = stddev^2 - eps |
| renorm_mean, renorm_stddev, over their _weight | without moving averages | as these |
| ra_mean, ra_var, steps, scale, bias | CrossQ (sb3-contrib) | the same, counter, weight, bias |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from syncnorm import checks, undocumented
from syncnorm.errors import InputError, join_first
from syncnorm.layers import SyncBatchRenorm
from syncnorm.module import MODE_BUFFERS

Entries = dict[str, Tensor]


@dataclass(frozen=True)
class Left:
    """Names of a state dict and a model that do not go together."""

    missing: tuple[str, ...] = ()
    """The model's, for which the state has nothing."""
    unexpected: tuple[str, ...] = ()
    """The state's, which the model does not have."""
    reshaped: tuple[str, ...] = ()
    """The names that have other shapes, with both."""

    def lines(self, most: int = 3) -> list[str]:
        """Write a line for each kind, with the number of names and the first ones."""
        kinds = (
            (self.missing, "of the model that the state lacks"),
            (self.unexpected, "of the state that the model does not have"),
            (self.reshaped, "of other shapes"),
        )
        return [
            f"{len(names)} {what}: {', '.join(names[:most])}{', ...' if len(names) > most else ''}"
            for names, what in kinds
            if names
        ]


@dataclass(frozen=True)
class Adopted:
    """A report of `adopt_state_dict`; printing it gives the text."""

    layers: dict[str, str]
    """The library recognised for each batch norm, by qualified name."""
    notes: tuple[str, ...]
    """Values that were changed or made up, and facts that a state dict does not hold."""
    left: Left
    """The names that did not fit; none unless `partial`."""

    def __str__(self) -> str:
        kinds = sorted(set(self.layers.values()))
        lines = [
            f"{sum(k == kind for k in self.layers.values())} batch norms as {kind}"
            for kind in kinds
        ]
        return "\n".join((*lines, *self.notes, *self.left.lines()))


class _Read(NamedTuple):
    """A layer's entries under our names, and notes about them."""

    kind: str
    entries: Entries
    notes: tuple[str, ...] = ()


def adopt_state_dict(
    model: nn.Module, state: Mapping[str, Any], *, source: str | None = None, partial: bool = False
) -> Adopted:
    """Fill `model` from a state dict of another library: all of it, or nothing and an error.

    Batch norms are found by the model's names and recognised by what their entries are called (see
    this module's table); everything else must have the model's own names and shapes. A prefix
    "module." or "_orig_mod." of all names is left out, and Keras's "bn/gamma:0" is read as
    bn.gamma. A layer or a part of a model can be filled alone: `adopt_state_dict(model.bn1,
    entries)`.

    Not in any state dict, and so not adopted: eps, momentum, activations. The notes say where a
    library's default eps is not the layer's. Running statistics are read so that evaluation gives
    what it gave there. Where Keras has two sets of averages (renorm=True), those that its
    evaluation used are taken.

    *Collectives*: none. Every worker must adopt the same state.

    Args:
        model: changed in place, parameters by `load_state_dict`.
        state: names to tensors or arrays.
        source: "inplace_abn" must be named, since its entries are called as torch's are and mean
            something else; "torch", "keras" and "crossq" insist on theirs. None: recognised.
        partial: True to fill what fits by name and shape, and leave the rest as it is.

    Returns:
        What was recognised, changed, made up and left.

    Raises:
        InputError: names are missing or left over, or shapes differ; with `partial`, nothing fits;
            an entry holds no numbers, other kinds of numbers, or larger ones than the model's type
            has; the model is sharded. Nothing was changed. (What a module's own `set_extra_state` raises
            comes after parameters were.)

    Example:
        >>> layer = nn.BatchNorm1d(1, eps=1e-3)
        >>> names = ("moving_mean", "moving_variance", "gamma", "beta")
        >>> print(adopt_state_dict(layer, dict.fromkeys(names, torch.ones(1))))
        1 batch norms as keras
        '': num_batches_tracked = 0, since the state has no counter
    """
    if source is not None:
        checks.check_choice("source", source, ("torch", "inplace_abn", "keras", "crossq"))
    if any(undocumented.is_managed_by_fsdp(module) for module in model.modules()):
        raise InputError(
            "`model` must not be sharded, got one of FSDP. Adopt the state before `fully_shard` or "
            "FullyShardedDataParallel. Nothing was changed."
        )
    target = model.state_dict()
    entries = _tidy(_tensors(state), target)
    layers: dict[str, str] = {}
    notes: list[str] = []
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            prefix = f"{name}." if name else ""
            own = _take(entries, prefix)
            if partial and not own:
                continue
            read = _read(own, layer, source, name)
            entries |= {prefix + key: value for key, value in read.entries.items()}
            layers[name] = read.kind
            notes += (f"{name!r}: {note}" for note in read.notes)
    # Those of a mode are left out where the model's layers have another, as layers themselves do.
    entries = {
        name: value
        for name, value in entries.items()
        if name in target or not name.endswith(tuple(MODE_BUFFERS))
    }
    if partial:
        left, entries = _fitting(entries, target)
    else:
        left = Left()
        _check(entries, target)
    _check_numbers(entries, target, {name for name, _ in model.named_parameters()})
    model.load_state_dict(entries)
    return Adopted(layers, tuple(notes), left)


class NumbersError(InputError):
    """An entry's numbers are none that the model's tensor can hold."""


def _check_numbers(entries: Entries, target: Mapping[str, Any], parameters: set[str]) -> None:
    """Refuse what `load_state_dict` would fail at, or change without a word."""
    for name, value in entries.items():
        own = target.get(name)
        if not isinstance(value, Tensor) or not isinstance(own, Tensor):
            continue
        rule = ""
        if value.is_meta or value.layout is not torch.strided or value.is_quantized:
            rule = "a plain tensor with numbers in it"
        elif own.is_floating_point():
            if value.is_complex() or (name in parameters and not value.is_floating_point()):
                rule = f"floating, got {value.dtype}"
            elif value.dtype != own.dtype and not torch.equal(
                _finite(value.to(own.dtype)), _finite(value)
            ):
                rule = f"numbers that {own.dtype} has, got larger ones"
            elif name.rpartition(".")[2] == "running_var" and not bool((value >= 0).all()):
                rule = "at least 0, got a negative variance or nan"
        if rule:
            raise NumbersError(f"{name!r} must be {rule}. Nothing was changed.")


def _finite(t: Tensor) -> Tensor:
    return t.double().isfinite()  # which some small types do not say themselves


def _tensors(state: object) -> dict[str, Any]:
    """The entries as tensors. Those of `get_extra_state` may be anything and are kept.

    Raises:
        InputError: there are other entries, as in a whole checkpoint; the message names the places
            of state dicts in it.
    """
    entries: dict[str, Any] = {}
    others: dict[object, str] = {}
    for name, value in state.items() if isinstance(state, Mapping) else ():
        is_as_it_is = isinstance(value, Tensor) or str(name).endswith("_extra_state")
        try:
            entries[name] = value if is_as_it_is else torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            others[name] = type(value).__name__
    if isinstance(state, Mapping) and not others and all(isinstance(name, str) for name in entries):
        return entries
    kinds = ", ".join(f"{kind} under {name!r}" for name, kind in [*others.items()][:4])
    places = [path for path, _ in sorted(_state_dicts(state), key=lambda place: -place[1])]
    found = " or ".join(f"state{path}" for path in places[:4])
    raise InputError(
        "`state` must be a state dict, tensors or arrays by name, got "
        f"{type(state).__name__}{f' with {kinds}' if kinds else ''}. "
        f"{f'Pass {found}' if found else 'Load the file, and pass what state_dict() gave'}. "
        "Nothing was changed."
    )


def _state_dicts(value: object, depth: int = 4) -> list[tuple[str, int]]:
    """The places of state dicts in a checkpoint, as Python expressions, with their sizes."""
    if isinstance(value, nn.Module):
        return [(".state_dict()", len(value.state_dict()))]
    if not isinstance(value, Mapping) or depth == 0:
        return []
    entries = {k: v for k, v in value.items() if isinstance(k, str)}
    has_known = any(_dotted(name).rpartition(".")[2] in _NAMES for name in entries)
    if has_known and all(hasattr(v, "shape") and hasattr(v, "dtype") for v in entries.values()):
        return [("", len(entries))]
    return [
        (f"[{k!r}]{path}", size)
        for k, v in entries.items()
        for path, size in _state_dicts(v, depth - 1)
    ]


def _dotted(name: str) -> str:
    """A name in torch's form, from Keras's."""
    return name.removesuffix(":0").replace("/", ".") if "/" in name or name.endswith(":0") else name


def _tidy(state: Mapping[str, Any], target: Mapping[str, Any]) -> Entries:
    """Entries under names in torch's form, without prefixes that wrappers add."""
    entries = {_dotted(name): value for name, value in state.items()}
    for prefix in ("module.", "_orig_mod."):
        is_own = any(name.startswith(prefix) for name in target)
        if entries and not is_own and all(name.startswith(prefix) for name in entries):
            entries = {name.removeprefix(prefix): value for name, value in entries.items()}
    return entries


_NAMES = {
    "running_mean", "running_var", "num_batches_tracked", "weight", "bias", *MODE_BUFFERS,
    "moving_mean", "moving_variance", "moving_stddev", "gamma", "beta",
    "renorm_mean", "renorm_stddev", "renorm_mean_weight", "renorm_stddev_weight",
    "ra_mean", "ra_var", "steps", "scale",
}  # fmt: skip


def _take(entries: Entries, prefix: str) -> Entries:
    """Remove from `entries` those of one layer that have a known name, and return them."""
    return {name: entries.pop(prefix + name) for name in sorted(_NAMES) if prefix + name in entries}


def _read(own: Entries, layer: _BatchNorm, source: str | None, name: str) -> _Read:
    """Recognise a layer's entries, and give them our names."""
    readers = {
        "keras": _read_keras,
        "crossq": _read_crossq,
        "torch": _read_torch,
        "inplace_abn": _read_inplace_abn,
    }
    kind = source or _recognise(own)
    if _recognise(own) != ("torch" if kind == "inplace_abn" else kind):
        raise InputError(
            f"`source` must be what the state is of, got {source!r} for {name!r} with "
            f"{sorted(own)}. Leave it out."
        )
    read = readers[kind](own, layer)
    if layer.num_batches_tracked is not None and "num_batches_tracked" not in read.entries:
        read.entries["num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
        return read._replace(
            notes=(*read.notes, "num_batches_tracked = 0, since the state has no counter")
        )
    clock = read.entries.get("num_batches_tracked", torch.zeros(()))
    # A clock of another shape is refused later, with all that does not fit.
    has_run = clock.numel() == 1 and bool(clock > 0)
    if isinstance(layer, SyncBatchRenorm) and kind == "torch" and has_run:
        note = (
            f"the schedule's clock stands at {int(clock)}; if that was batch normalisation, set "
            "num_batches_tracked to 0"
        )
        return read._replace(notes=(*read.notes, note))
    return read


def _recognise(own: Entries) -> str:
    if {"moving_mean", "renorm_mean"} & own.keys():
        return "keras"
    return "crossq" if "ra_mean" in own else "torch"


def _read_torch(own: Entries, layer: _BatchNorm) -> _Read:
    return _Read("torch", own)


def _read_inplace_abn(own: Entries, layer: _BatchNorm) -> _Read:
    """y = xhat * (abs(weight) + eps) + bias, followed by an activation."""
    if "weight" not in own:
        return _Read("inplace_abn", own)
    negative = int((own["weight"] < 0).sum())
    own["weight"] = own["weight"].abs() + layer.eps
    note = (
        f"weight = abs(weight) + {layer.eps:g} ({negative} were negative); the activation must "
        "follow the layer"
    )
    return _Read("inplace_abn", own, (note,))


def _read_keras(own: Entries, layer: _BatchNorm) -> _Read:
    """Biased variances; with renorm=True averages of sigma = sqrt(var + eps)."""
    notes: list[str] = []
    mean, var, std = (
        own.pop(key, None) for key in ("moving_mean", "moving_variance", "moving_stddev")
    )
    averages = {key: own.pop(key) for key in sorted(own) if key.startswith("renorm_")}
    if mean is None and averages:
        mean, std = (_debiased(averages, key) for key in ("renorm_mean", "renorm_stddev"))
        notes.append(
            "running statistics from renorm_mean and renorm_stddev, since the state has no moving "
            "averages"
        )
    elif averages:
        notes.append(
            "renorm_mean and renorm_stddev were left out: evaluation used the moving averages"
        )
    if std is not None:
        var = (std.cpu().double().square() - layer.eps).clamp(min=0.0).to(std)
        notes.append(f"running_var = stddev^2 - {layer.eps:g}, which keeps sigma whatever eps was")
    elif layer.eps != 1e-3:
        notes.append(f"eps is {layer.eps:g} here, and 0.001 in Keras by default")
    entries = {
        key: value
        for key, value in (("running_mean", mean), ("running_var", var))
        if value is not None
    }
    for theirs, ours, neutral in (("gamma", "weight", 1.0), ("beta", "bias", 0.0)):
        parameter = getattr(layer, ours)
        if theirs in own:
            entries[ours] = own.pop(theirs)
        elif parameter is not None and mean is not None:
            entries[ours] = torch.full_like(mean, neutral)
            notes.append(f"{ours} = {neutral:g}, since the state has no {theirs}")
    return _Read("keras", own | entries, tuple(notes))


def _debiased(averages: Entries, name: str) -> Tensor | None:
    """An average of Keras over its weight, if there is one: older versions average from 0."""
    value, weight = averages.get(name), averages.get(f"{name}_weight")
    if value is None or weight is None:
        return value
    if weight.numel() != 1:
        raise InputError(
            f"`state` must hold one number as {name}_weight, got shape {tuple(weight.shape)}. Give "
            "the layer's own entry. Nothing was changed."
        )
    if not 0 < weight < math.inf:
        raise InputError(
            f"`state` must hold averages of something, got {name}_weight = {float(weight):g}. "
            "Train first. Nothing was changed."
        )
    return value / weight.reshape(())


def _read_crossq(own: Entries, layer: _BatchNorm) -> _Read:
    """y = (x - ra_mean) / sqrt(ra_var + eps) * scale + bias, ra_var of unbiased variances."""
    names = {
        "ra_mean": "running_mean",
        "ra_var": "running_var",
        "steps": "num_batches_tracked",
        "scale": "weight",
    }
    notes = (
        () if layer.eps == 1e-3 else (f"eps is {layer.eps:g} here, and 0.001 in CrossQ by default",)
    )
    if isinstance(layer, SyncBatchRenorm) and layer.running_average != "var":
        notes += ('its running_var averages variances; running_average="var" goes on so',)
    return _Read("crossq", {names.get(key, key): value for key, value in own.items()}, notes)


def _compare(entries: Entries, target: Mapping[str, Any]) -> tuple[list[str], ...]:
    """The names that are missing, left over, and of another shape."""
    missing = [
        name for name in target if name not in entries and not name.endswith(tuple(MODE_BUFFERS))
    ]
    unexpected = [name for name in entries if name not in target]
    reshaped = [
        name
        for name, value in entries.items()
        if name in target and isinstance(target[name], Tensor) and not is_lazy(target[name])
        and value.shape != target[name].shape
    ]  # fmt: skip
    return missing, unexpected, reshaped


def _check(entries: Entries, target: Mapping[str, Any]) -> None:
    """Raise InputError unless these are all of the model's entries, with its shapes."""
    missing, unexpected, reshaped = _compare(entries, target)
    faults = [f"nothing for {name!r}" for name in missing]
    faults += [f"{name!r}, which the model does not have" for name in unexpected]
    faults += [
        f"{name!r} of shape {tuple(entries[name].shape)}, which is {tuple(target[name].shape)} in "
        "the model"
        for name in reshaped
    ]
    if faults:
        raise InputError(
            f"`state` must have the model's entries, got {join_first(faults, 8, '; ')}. Rename or "
            "leave out what does not fit, or fill a part of the model. Nothing was changed."
        )


def _fitting(entries: Entries, target: Mapping[str, Any]) -> tuple[Left, Entries]:
    """The model's entries, with those of the state that fit; and the names of those that do not."""
    missing, unexpected, reshaped = _compare(entries, target)
    fitting = {k: v for k, v in entries.items() if k in target and k not in reshaped}
    if not any(name.rpartition(".")[2] != "num_batches_tracked" for name in fitting):
        raise InputError(
            f"`state` must have entries that fit the model, got {', '.join([*entries][:4])}, ... "
            f"for {', '.join([*target][:4])}, .... Nothing was changed."
        )
    shapes = [f"{k} {tuple(entries[k].shape)} for {tuple(target[k].shape)}" for k in reshaped]
    return Left(tuple(missing), tuple(unexpected), tuple(shapes)), {**target, **fitting}
