"""Classes of converted layers that are subclasses of torch's batch norms, and their forwards.

A layer of exactly torch's class becomes `SyncBatchNorm` itself. For a subclass a class is made that
has both as bases, so that the subclass's other methods stay (such as a `train` that keeps the layer
frozen). If the subclass has a forward of its own, an adapter must say what it does besides
normalising.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from syncnorm import checks, tracing
from syncnorm.errors import InputError
from syncnorm.module import SyncNorm

Adapter = Callable[[Any, Tensor, Callable[[Tensor], Tensor]], Tensor]
"""From the layer, its input and the function that normalises, to the layer's output."""

TORCHS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, _BatchNorm)
# What a subclass may have of its own that a layer of another class does not lose.
_NOTHING = {
    *("__module__", "__qualname__", "__doc__", "__annotations__", "__firstlineno__"),
    *("__static_attributes__", "__dict__", "__weakref__", "_check_input_dim"),
}


def _drop_and_act(layer: nn.Module, x: Tensor, normalize: Callable[[Tensor], Tensor]) -> Tensor:
    """The forward of timm's layers: normalisation, dropout, activation."""
    y = normalize(x)
    for name in ("drop", "act"):
        part = getattr(layer, name, None)
        y = y if part is None else part(y)
    return y


_registered: dict[type, Adapter] = {}
# By name, since importing timm takes seconds.
_shipped: dict[str, Adapter] = {
    "timm.layers.norm_act.BatchNormAct2d": _drop_and_act,
    "timm.layers.norm_act.SyncBatchNormAct": _drop_and_act,
}


def register_adapter(cls: type[_BatchNorm], forward: Adapter) -> None:
    """Have `convert` accept a subclass of torch's batch norms that has a forward of its own.

        y = forward(layer, x, normalize)

    with `normalize(x)` = what our layer does to x, in training and in evaluation. Once it is
    converted, the layer still is a `cls`, with its attributes, submodules and other methods; only
    its forward is this one. (One of torch's SyncBatchNorm without further methods is no `cls` then:
    DistributedDataParallel refuses such layers on CPUs.) `revert` gives it its own back. The adapter
    holds for subclasses of `cls` that do not override forward again. timm's `BatchNormAct2d` and
    `SyncBatchNormAct` need none: theirs is built in.

    *Collectives*: those of `normalize`. `forward` must call it as often on every worker.

    Args:
        cls: the subclass. Register it in every process that converts, copies or unpickles such
            layers.
        forward: what the layer does, see above.

    Raises:
        InputError: `cls` is no subclass of torch's batch norms, or has no forward of its own.

    Example:
        >>> class NormAndReLU(nn.BatchNorm2d):
        ...     def forward(self, x):
        ...         return super().forward(x).relu()
        >>> register_adapter(NormAndReLU, lambda layer, x, normalize: normalize(x).relu())
    """
    if not (isinstance(cls, type) and issubclass(cls, _BatchNorm)) or issubclass(cls, SyncNorm):
        raise InputError(
            f"`cls` must be a subclass of torch's BatchNorm, got {cls!r}. Others are not converted."
        )
    if _owner_of_forward(cls) is not cls:
        raise InputError(
            f"`cls` must have a forward of its own, got {cls.__qualname__}, which has that of "
            f"{_owner_of_forward(cls).__qualname__}. Register that class, or none: torch's forward "
            "needs no adapter."
        )
    _registered[cls] = forward


def _owner_of_forward(cls: type) -> type:
    return next(c for c in cls.__mro__ if "forward" in vars(c))


def has_torchs_forward(cls: type) -> bool:
    """True if the forward of this class is torch's, which only normalises."""
    return _owner_of_forward(cls) in TORCHS


def own_names(cls: type) -> set[str]:
    """The names that a subclass of torch's batch norms adds to them."""
    names: set[str] = set()
    for each in itertools.takewhile(lambda each: each not in TORCHS, cls.__mro__):
        names |= vars(each).keys() - _NOTHING
    return names


def adapter_of(cls: type) -> Adapter | None:
    """The adapter that was registered for a class whose forward is not torch's."""
    owner = _owner_of_forward(cls)
    return _registered.get(owner) or _shipped.get(f"{owner.__module__}.{owner.__qualname__}")


class Over:
    """Mixin of a class made for a subclass of torch's: lets its layers be copied and pickled."""

    made_of: tuple[type[SyncNorm], type[_BatchNorm]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time: unpickling cannot import it by name.
        _, _, *state = super().__reduce_ex__(protocol)
        return (_new, self.made_of, *state)


class _Adapted(Over):
    """Mixin for a subclass with a forward of its own: runs its adapter."""

    def forward(
        self, x: Tensor | None = None, mask: Tensor | None = None, *, input: Tensor | None = None
    ) -> Tensor:
        if x is None or input is not None:
            x = checks.one_input(x, input)
        if isinstance(x, tracing.Proxy):  # one call of the module, what it does besides included
            return tracing.module_call(self, x, mask)  # pyright: ignore[reportArgumentType]
        ours, theirs = self.made_of
        adapter = adapter_of(theirs)
        if adapter is None:
            raise InputError(
                f"`{theirs.__qualname__}` must have an adapter in this process, got a converted "
                "layer without one. Call register_adapter before using it."
            )
        return adapter(self, x, lambda x: ours.forward(self, x, mask))  # pyright: ignore[reportArgumentType]


@cache
def over(ours: type[SyncNorm], theirs: type[_BatchNorm]) -> type[SyncNorm]:
    """The class of a layer of class `theirs` once it is converted to `ours`.

    Raises:
        TypeError: Python cannot make a class of both.
    """
    if theirs in TORCHS:
        return ours
    mixed = Over if has_torchs_forward(theirs) else _Adapted
    bases = (mixed, ours, theirs)
    # Not what DistributedDataParallel would take for torch's layer, and refuse on CPUs.
    if issubclass(theirs, nn.SyncBatchNorm) and own_names(theirs) <= {"__init__", "forward"}:
        bases = (mixed, ours)
    return type(f"{ours.__name__}_{theirs.__name__}", bases, {"made_of": (ours, theirs)})


def _new(ours: type[SyncNorm], theirs: type[_BatchNorm]) -> SyncNorm:
    return object.__new__(over(ours, theirs))


def own_class(layer: nn.Module) -> type:
    """The class of a layer before torch.nn.utils.parametrize replaced it."""
    return parametrize.type_before_parametrizations(layer)


def set_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Set the class of a layer, under its parametrizations if it has any."""
    if parametrize.is_parametrized(layer):
        # The parametrized properties live in a class made for this layer alone. Its base is the
        # class that torch restores when the parametrizations are removed.
        names = {
            k: v
            for k, v in vars(type(layer)).items()
            if k not in ("__dict__", "__weakref__", "__doc__")
        }
        cls = type(f"Parametrized{cls.__name__}", (cls,), names)
    layer.__class__ = cls


def their_class(layer: nn.Module) -> type[_BatchNorm]:
    """The class of torch's, or a subclass of it, that a layer has besides ours."""
    cls = own_class(layer)
    if issubclass(cls, Over):
        return cls.made_of[1]
    return _BatchNorm if issubclass(cls, SyncNorm) else cls
