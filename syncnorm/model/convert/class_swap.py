"""Swap of a layer's class for one of ours, in place, and back.

The object stays: its class changes, and the attributes that our class needs are added. References
to the layer and to its parameters (other names in the model, hooks, optimizers) stay valid. A
record of the former state is kept in the layer, and travels with its copies and pickles.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from syncnorm import checks, tracing
from syncnorm.comm import groups
from syncnorm.layers import SyncBatchRenorm
from syncnorm.maths.precision import HALF_TYPES
from syncnorm.model.convert.adapters import over, own_class, set_class, their_class
from syncnorm.module import SyncNorm
from syncnorm.statistics import mode_of

# Attributes of torch's layers that a swap may set to another value.
_SHARED = ("momentum", "eps", "workers", "sync_mode")


@dataclass(frozen=True)
class Request:
    """The arguments of `convert`, for one layer."""

    to: type[SyncNorm]
    workers: groups.GroupHandle = None
    options: dict[str, Any] = field(default_factory=dict)

    def momentum(self, layer: _BatchNorm) -> float | None:
        """The option; else the layer's own.

        Between normalisation and renormalisation the target's default takes the place of the
        latter.
        """
        is_other = isinstance(layer, SyncBatchRenorm) != issubclass(self.to, SyncBatchRenorm)
        default = (
            inspect.signature(self.to).parameters["momentum"].default
            if is_other
            else layer.momentum
        )
        return self.options.get("momentum", default)

    def group(self, layer: _BatchNorm) -> groups.Spec:
        """The group that was asked for; else that of the layer, if it has one."""
        return (
            groups.to_user(self.workers)
            if self.workers is not None
            else getattr(layer, "process_group", None)
        )

    def settings(self, layer: _BatchNorm) -> dict[str, Any]:
        """The arguments of `set_up`: the options, else the values that a layer of ours has."""
        names = _setting_names(self.to)
        current = _settings_of(layer, names) if isinstance(layer, SyncNorm) else {}
        given = {name: value for name, value in self.options.items() if name in names}
        if "sync" in given:
            # As a layer has it, so that what is asked for again is known as the same.
            given["sync"] = mode_of(given["sync"]).argument
        return current | given

    def is_met_by(self, layer: _BatchNorm) -> bool:
        """True if a conversion by this request would not change the layer."""
        if not isinstance(layer, self.to):
            return False
        settings = self.settings(layer)
        return (
            layer.momentum,
            layer.eps,
            layer.process_group,
            _settings_of(layer, list(settings)),
        ) == (self.momentum(layer), self.options.get("eps", layer.eps), self.group(layer), settings)


@dataclass
class Original:
    """The record of a converted layer's former state."""

    cls: type[_BatchNorm]
    changed: dict[str, Any] = field(default_factory=dict)
    """Former values of attributes that have another one now."""
    added: set[str] = field(default_factory=set)
    """Names of attributes that it did not have."""
    workers: groups.GroupHandle | Literal[False] = False
    """The process group, if it was torch's SyncBatchNorm; else False."""
    counted: int = 0
    """Batches counted before a schedule's clock began at 0."""


def original_of(layer: nn.Module) -> Original | None:
    """The layer's record; None if it was not converted."""
    return vars(layer).get("_original")


def swap_in(layer: _BatchNorm, name: str, request: Request) -> None:
    """Convert the layer as requested.

    Nothing here may fail: `refuse` has checked all layers before the first is changed.
    """
    if isinstance(layer, _LazyNormBase):
        _swap_in_later(layer, name, request)
        return
    momentum, group, settings = (
        request.momentum(layer),
        request.group(layer),
        request.settings(layer),
    )
    original, theirs = original_of(layer) or Original(own_class(layer)), their_class(layer)
    _reset_clock(layer, original, request.to)
    if isinstance(layer, SyncNorm):
        _detach(layer)
    before = dict(vars(layer))
    if "process_group" in before:
        # torch's SyncBatchNorm. Kept as a handle, since a group can be neither copied nor pickled.
        original.workers = groups.to_handle(before["process_group"])
        del layer.__dict__["process_group"]
    set_class(layer, over(request.to, theirs))
    assert isinstance(layer, SyncNorm)
    layer.set_up(group, **settings)
    layer.momentum, layer.eps = momentum, request.options.get("eps", layer.eps)
    layer.label = name or layer.label
    after = layer.__dict__
    changed = {
        k: before[k]
        for k in _SHARED
        if k in before and before[k] is not after[k] and k not in original.added
    }
    original.changed = changed | original.changed
    original.added |= after.keys() - before.keys()
    after["_original"] = original


def _reset_clock(layer: _BatchNorm, original: Original, to: type[SyncNorm]) -> None:
    """Begin a schedule's clock at 0 for renormalisation; restore the count on the way back."""
    counter = layer.num_batches_tracked
    if counter is None or tracing.is_fake(layer):
        return
    with torch.no_grad():
        if issubclass(to, SyncBatchRenorm) and not isinstance(layer, SyncBatchRenorm):
            original.counted += int(counter)
            counter.zero_()
        elif isinstance(layer, SyncBatchRenorm) and not issubclass(to, SyncBatchRenorm):
            counter += original.counted
            original.counted = 0


def swap_back(layer: nn.Module, born: type[_BatchNorm] | None = None) -> None:
    """Give the layer its former class and attributes.

    Args:
        born: the class of a layer that was built as ours.
    """
    if isinstance(layer, LazySyncNorm):
        layer.swap_back()
        return
    assert isinstance(layer, SyncNorm)
    _detach(layer)
    added = vars(layer).keys() - vars(nn.BatchNorm1d(1)).keys() - {"_original"}
    original = original_of(layer) or Original(born or nn.BatchNorm1d, added=added)
    if original.counted and layer.num_batches_tracked is not None:
        with torch.no_grad():
            layer.num_batches_tracked += original.counted
    set_class(layer, original.cls)
    attributes = layer.__dict__
    attributes.pop("_original", None)
    for name in original.added & attributes.keys():
        del attributes[name]
    attributes |= original.changed
    if original.workers is not False:
        attributes["process_group"] = groups.to_user(original.workers)
    if isinstance(layer, SyncNorm):
        label = layer.label
        layer.set_up(layer.process_group, **_settings_of(layer, _setting_names(type(layer))))
        layer.label = label
    else:
        narrow_statistics(layer)


def narrow_statistics(layer: _BatchNorm) -> None:
    """Give running statistics the type of half weights, which torch's layer needs."""
    has_both = layer.weight is not None and layer.running_mean is not None
    if has_both and layer.weight.dtype in HALF_TYPES:
        for name in ("running_mean", "running_var"):
            layer._buffers[name] = layer.get_buffer(name).to(layer.weight.dtype)


def _setting_names(cls: type[SyncNorm]) -> list[str]:
    """The options of `set_up`."""
    parameters = inspect.signature(cls.set_up).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def _settings_of(layer: SyncNorm, names: list[str]) -> dict[str, Any]:
    settings = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    return settings | {"sync": layer.sync_mode.argument}


def _detach(layer: SyncNorm) -> None:
    """Flush pending updates, detach the layer from its pool, remove the buffers of its mode."""
    layer.statistics.release(layer)
    for name in layer.sync_mode.buffer_names:
        layer._buffers.pop(name, None)


class LazySyncNorm(_LazyNormBase, _BatchNorm):
    """A lazy batch norm that was converted before it knew its number of channels.

    Before its first forward torch's hook initialises the parameters. That forward makes it the
    class that the lazy layer would have become, converts that, and runs the converted layer.
    """

    cls_to_become: Any = None
    num_features: int
    pending: Pending

    def initialize_parameters(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor | None = None, mask: Tensor | None = None, *, input: Tensor | None = None
    ) -> None:
        super().initialize_parameters(checks.one_input(x, input))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        pending = self.pending
        become_class = self.__dict__.pop("cls_to_become", pending.cls.cls_to_become)
        # Loading a state dict initialises the parameters, and leaves the number of channels at 0.
        x = checks.input_of(args, kwargs)
        self.num_features = self.num_features or x.shape[1]
        self.swap_back()
        self.__class__ = become_class
        swap_in(self, pending.name, pending.request)
        return type(self).forward(self, *args, **kwargs)

    def swap_back(self) -> None:
        """Make it the lazy layer that it was before the conversion."""
        self.__class__ = self.__dict__.pop("pending").cls


@dataclass
class Pending:
    """A conversion that a lazy layer makes at its first forward."""

    cls: type[_LazyNormBase]
    name: str
    request: Request


def _swap_in_later(layer: _LazyNormBase, name: str, request: Request) -> None:
    if isinstance(layer, LazySyncNorm):
        earlier = layer.pending.request
        names = inspect.signature(request.to).parameters
        options = {k: v for k, v in earlier.options.items() if k in names} | request.options
        request = Request(
            request.to, earlier.workers if request.workers is None else request.workers, options
        )
        layer.swap_back()
    layer.__dict__["pending"] = Pending(type(layer), name, request)
    layer.__class__ = LazySyncNorm
