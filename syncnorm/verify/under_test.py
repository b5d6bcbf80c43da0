"""The layer class under test, and its claims."""

from __future__ import annotations

import importlib
import inspect
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor, nn

from syncnorm.errors import ConfigError, in_one_line
from syncnorm.layers import SyncBatchNorm, SyncBatchRenorm
from syncnorm.maths.renorm import RenormSchedule
from syncnorm.model.arguments import constructor_arguments
from syncnorm.module import SyncNorm

BOUNDS = (1.5, 0.5)
"""r_max and d_max of a renormalising layer in most checks: some channels are clipped."""

# The claims of our layers beyond those of any batch normalisation; checks need them by name.
_OURS = ("mask", "messages", "double backward", "compile", "float32 statistics")
_OPTIONS = ("eps", "momentum", "affine", "track_running_stats", "process_group")
DIMENSIONS = (2, 3, 4, 5)
"""The numbers of dimensions of the inputs in checks."""
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)
_PACKAGE = "syncnorm:"
_shapes: weakref.WeakKeyDictionary[nn.Module, Size] = weakref.WeakKeyDictionary()
"""The shape of the input of a layer in the running call."""


@dataclass(frozen=True)
class LayerUnderTest:
    """A layer class under test.

    Args:
        reference: `package:Class`, imported on each worker.
        accepted: arguments that its constructor takes, besides the number of channels.
        claims: names of such arguments, and "mask", "messages" (one of at most 2C+2
            numbers in each direction), "renorm", "double backward", "compile", "float32 statistics"
            (also of a half layer), and the numbers of dimensions of its input, such as "4-D input".
        dimensions: of the input that it takes; others are brought into the most of these.
    """

    reference: str
    accepted: frozenset[str]
    claims: frozenset[str]
    dimensions: tuple[int, ...] = DIMENSIONS

    @property
    def name(self) -> str:
        """The class's own name."""
        return self.reference.partition(":")[2]

    @property
    def is_renorm(self) -> bool:
        """True for a renormalising layer, whose oracle is another."""
        return "renorm" in self.claims

    @property
    def shapes(self) -> str:
        """The inputs that it takes, in words."""
        taken = " and ".join(f"{ndim}-D" for ndim in self.dimensions)
        others = f"the checks give it others as {self.dimensions[-1]}-D"
        return f"{self.name} takes {taken} inputs only; {others}"

    def make(self, num_features: int, **options: Any) -> nn.Module:
        """Build a layer with those of the options that its constructor takes."""
        if self.is_renorm:
            bounds = options.pop("bounds", BOUNDS)
            options = {"schedule": RenormSchedule.constant(*bounds), **options}
        given = {"eps": 1e-5, "momentum": 0.1, "affine": True, **options}
        layer = load(self.reference)(
            num_features, **{k: v for k, v in given.items() if k in self.accepted}
        )
        if self.dimensions != DIMENSIONS:
            _reshape(layer, self.dimensions)
        return layer

    def lacks(self, needs: tuple[str, ...]) -> str | None:
        """The reason why a check with these needs is not offered; None if it is."""
        for need in needs:
            wanted = need.removeprefix("no ")
            if (wanted in self.claims) == need.startswith("no "):
                is_excluded = need == "no renorm"
                return (
                    f"{self.name} {'renormalises' if is_excluded else f'does not claim {wanted}'}"
                )
        return None


def layer_under_test(reference: str) -> LayerUnderTest:
    """Import a layer class; one that is not ours claims the options in its signatures.

    Raises:
        ConfigError: there is no such class, or it is no layer.
    """
    cls = load(reference)
    accepted = frozenset(constructor_arguments(cls))
    claims = set(accepted & set(_OPTIONS))
    if issubclass(cls, SyncNorm):
        claims.update(_OURS)
    elif "mask" in inspect.signature(cls.forward).parameters:
        claims.add("mask")
    if issubclass(cls, SyncBatchRenorm):
        claims = (claims | {"renorm"}) - {"track_running_stats"}
    dimensions = tuple(ndim for ndim in DIMENSIONS if _takes(cls, ndim)) or DIMENSIONS
    claims |= {f"{ndim}-D input" for ndim in dimensions}
    return LayerUnderTest(reference, accepted, frozenset(claims), dimensions)


def _takes(cls: type[nn.Module], ndim: int) -> bool:
    """False if the class refuses this many dimensions, in the way of torch's batch norms."""
    check = getattr(cls, "_check_input_dim", None)
    if check is None or issubclass(cls, SyncNorm):
        return True
    try:
        check(object.__new__(cls), torch.empty([1] * ndim))
    except ValueError:
        return False
    except Exception:  # it looks at more than the input: the checks will show
        return True
    return True


def ours() -> list[LayerUnderTest]:
    """Both of our layers."""
    return [
        layer_under_test(f"{_PACKAGE}{cls.__name__}") for cls in (SyncBatchNorm, SyncBatchRenorm)
    ]


def load(reference: str) -> type[nn.Module]:
    """Import a layer class.

    Raises:
        ConfigError: the reference is none, or names no layer class.
    """
    if not _REFERENCE.fullmatch(reference):
        raise ConfigError(
            f"`--layer` must be package.module:Class, got {reference!r}. For example "
            "torch.nn:SyncBatchNorm."
        )
    module, _, name = reference.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # whatever the module does as it is run
        cause = in_one_line(error)
        raise ConfigError(
            f"`--layer` must name what can be imported, got {reference!r}: {cause}. "
            "Put its folder on PYTHONPATH, or work in that folder."
        ) from None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(
            f"`--layer` must name a class of torch.nn.Module, got {reference!r}: {found!r}."
        )
    return found


def _reshape(layer: nn.Module, dimensions: tuple[int, ...]) -> None:
    """Have `layer`, which takes inputs of these dimensions, take (N, C, *S) of any, and give it back.

    A statistic is over all positions, so it does not matter how these are arranged. Hooks, not a
    wrapper: the layer's parameters and buffers keep their names.
    """
    layer.register_forward_pre_hook(partial(_before, dimensions))
    layer.register_forward_hook(_after)


def _before(
    dimensions: tuple[int, ...], layer: nn.Module, args: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    x, *others = args
    _shapes[layer] = x.shape
    if x.ndim in dimensions:
        return args
    if x.ndim < dimensions[-1]:
        return x.reshape(*x.shape, *[1] * (dimensions[-1] - x.ndim)), *others
    return x.flatten(dimensions[-1] - 1), *others


def _after(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    shape = _shapes.pop(layer)
    return output if output.shape == shape else output.reshape(shape)


Layer = Callable[..., Tensor]
"""From x, and a mask where there is one, to y."""
