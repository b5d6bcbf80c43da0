"""One layer becomes one of ours, in place, and goes back to what it was.

The object stays: its class changes, and what our class needs is added. So whatever refers to the
layer or holds its parameters (other names in the model, hooks, optimizers) goes on doing so. What
the layer was is remembered in it, and travels with its copies and pickles.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from syncnorm import functional, observed
from syncnorm.comm import groups
from syncnorm.layers import SyncBatchRenorm
from syncnorm.model.convert.adapters import over, own_class, set_class, their_class
from syncnorm.module import HALF_TYPES, SyncNorm

# Of torch's attributes those that we may set to something else.
_SHARED = ("momentum", "eps", "workers", "sync_mode")


@dataclass(frozen=True)
class Request:
    """The arguments of `convert`, for one layer."""

    to: type[SyncNorm]
    workers: groups.GroupHandle = None
    options: dict[str, Any] = field(default_factory=dict)

    def momentum(self, layer: _BatchNorm) -> float | None:
        """As asked for; else the target's default where normalisation becomes renormalisation or
        the reverse.
        """
        is_other = isinstance(layer, SyncBatchRenorm) != issubclass(self.to, SyncBatchRenorm)
        default = (
            inspect.signature(self.to).parameters["momentum"].default
            if is_other
            else layer.momentum
        )
        return self.options.get("momentum", default)

    def group(self, layer: _BatchNorm) -> groups.Spec:
        """As asked for; else that of the layer, if it has one."""
        return (
            groups.to_user(self.workers)
            if self.workers is not None
            else getattr(layer, "process_group", None)
        )

    def settings(self, layer: _BatchNorm) -> dict[str, Any]:
        """The arguments of `set_up`: as asked for, else what a layer of ours has already."""
        names = [
            p.name
            for p in inspect.signature(self.to.set_up).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        ]
        had = _settings_of(layer, names) if isinstance(layer, SyncNorm) else {}
        return had | {name: value for name, value in self.options.items() if name in names}

    def is_met_by(self, layer: _BatchNorm) -> bool:
        """True if the layer is all that already."""
        if not isinstance(layer, self.to):
            return False
        settings = self.settings(layer)
        return (
            layer.momentum,
            layer.eps,
            layer.process_group,
            _settings_of(layer, list(settings)),
        ) == (
            self.momentum(layer),
            self.options.get("eps", layer.eps),
            self.group(layer),
            settings,
        )


@dataclass
class Origin:
    """The record of a converted layer's former state."""

    cls: type[_BatchNorm]
    changed: dict[str, Any] = field(default_factory=dict)
    """Attributes that have another value now."""
    added: set[str] = field(default_factory=set)
    """Attributes that it did not have."""
    workers: groups.GroupHandle | Literal[False] = False
    """The process group, if it was torch's SyncBatchNorm."""
    counted: int = 0
    """Batches that it had counted when the clock of a schedule began again at 0."""


def origin_of(layer: nn.Module) -> Origin | None:
    """The layer's record; None if it was not converted."""
    return vars(layer).get("_origin")


def become(layer: _BatchNorm, name: str, request: Request) -> None:
    """Make the layer what is asked for.

    Nothing here may fail: what could has been looked at before.
    """
    if isinstance(layer, _LazyNormBase):
        _become_later(layer, name, request)
        return
    momentum, group, settings = (
        request.momentum(layer),
        request.group(layer),
        request.settings(layer),
    )
    origin, theirs = origin_of(layer) or Origin(own_class(layer)), their_class(layer)
    _turn_clock(layer, origin, request.to)
    if isinstance(layer, SyncNorm):
        _let_go(layer)
    before = dict(vars(layer))
    if "process_group" in before:
        # torch's SyncBatchNorm: a group can be neither copied nor pickled.
        origin.workers = groups.to_handle(before["process_group"])
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
        if k in before and before[k] is not after[k] and k not in origin.added
    }
    origin.changed = changed | origin.changed
    origin.added |= after.keys() - before.keys()
    after["_origin"] = origin


def _turn_clock(layer: _BatchNorm, origin: Origin, to: type[SyncNorm]) -> None:
    """A schedule begins when the layer becomes renormalisation; what was counted before is put
    aside.
    """
    counter = layer.num_batches_tracked
    if counter is None or observed.is_fake(layer):
        return
    with torch.no_grad():
        if issubclass(to, SyncBatchRenorm) and not isinstance(layer, SyncBatchRenorm):
            origin.counted += int(counter)
            counter.zero_()
        elif isinstance(layer, SyncBatchRenorm) and not issubclass(to, SyncBatchRenorm):
            counter += origin.counted
            origin.counted = 0


def go_back(layer: nn.Module, born: type[_BatchNorm] | None = None) -> None:
    """Make the layer what it was; one that was built as ours, a `born`."""
    if isinstance(layer, LazySyncNorm):
        layer.put_back()
        return
    assert isinstance(layer, SyncNorm)
    _let_go(layer)
    added = vars(layer).keys() - vars(nn.BatchNorm1d(1)).keys() - {"_origin"}
    origin = origin_of(layer) or Origin(born or nn.BatchNorm1d, added=added)
    if origin.counted and layer.num_batches_tracked is not None:
        with torch.no_grad():
            layer.num_batches_tracked += origin.counted
    set_class(layer, origin.cls)
    attributes = layer.__dict__
    attributes.pop("_origin", None)
    for name in origin.added & attributes.keys():
        del attributes[name]
    attributes |= origin.changed
    if origin.workers is not False:
        attributes["process_group"] = groups.to_user(origin.workers)
    if isinstance(layer, SyncNorm):
        label, names = layer.label, ("sync", "schedule", "running_average")
        layer.set_up(
            layer.process_group,
            **_settings_of(layer, [name for name in names if hasattr(layer, name)]),
        )
        layer.label = label
    elif (
        layer.weight is not None
        and layer.weight.dtype in HALF_TYPES
        and layer.running_mean is not None
    ):
        # With half weights torch's layer needs running statistics of their type.
        for name in ("running_mean", "running_var"):
            layer._buffers[name] = layer.get_buffer(name).to(layer.weight.dtype)


def _settings_of(layer: SyncNorm, names: list[str]) -> dict[str, Any]:
    settings = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    return settings | {"sync": layer.sync_mode.argument}


def _let_go(layer: SyncNorm) -> None:
    """The running statistics are up to date, nobody else acts for the layer, and nothing of ours is
    in its state.
    """
    layer.statistics.release(layer)
    for name in layer.sync_mode.buffers(1, "meta"):
        layer._buffers.pop(name, None)


class LazySyncNorm(_LazyNormBase, _BatchNorm):
    """A lazy batch norm that was converted before it knew its number of channels.

    torch's hook gives it parameters before its first forward, which makes it what the lazy layer
    would have become, and that a layer of ours. That forward is ours already.
    """

    cls_to_become = None
    pending: Pending

    def initialize_parameters(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor | None = None, mask: Tensor | None = None, *, input: Tensor | None = None
    ) -> None:
        super().initialize_parameters(functional.one_input(x, input))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        pending = self.pending
        become_class = self.__dict__.pop("cls_to_become", pending.cls.cls_to_become)
        # A state dict that was loaded has brought the parameters, and left the number of channels
        # at 0.
        x = args[0] if args else kwargs["input" if "input" in kwargs else "x"]
        self.num_features = self.num_features or x.shape[1]
        self.put_back()
        self.__class__ = become_class
        become(self, pending.name, pending.request)
        return type(self).forward(self, *args, **kwargs)

    def put_back(self) -> None:
        """Make it the lazy layer that it was."""
        self.__class__ = self.__dict__.pop("pending").cls


@dataclass
class Pending:
    """A conversion that a lazy layer awaits."""

    cls: type[_LazyNormBase]
    name: str
    request: Request


def _become_later(layer: _LazyNormBase, name: str, request: Request) -> None:
    if isinstance(layer, LazySyncNorm):
        earlier = layer.pending.request
        names = inspect.signature(request.to).parameters
        options = {k: v for k, v in earlier.options.items() if k in names} | request.options
        request = Request(
            request.to, earlier.workers if request.workers is None else request.workers, options
        )
        layer.put_back()
    layer.__dict__["pending"] = Pending(type(layer), name, request)
    layer.__class__ = LazySyncNorm
