"""What is verified: a layer class, and what it claims to be able to do."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from syncnorm.base import SyncNorm
from syncnorm.errors import ConfigError
from syncnorm.layers import SyncBatchNorm, SyncBatchRenorm
from syncnorm.maths.renorm import RenormSchedule

BOUNDS = (1.5, 0.5)
"""r_max and d_max of a renormalising layer, unless a check says otherwise: some channels are clipped, some are not."""

# What our layers claim beyond what every batch normalisation does. One entry decides about the checks that need it.
_OURS = {
    "mask": True,
    "messages": True,
    "double backward": True,
    "compile": True,
    "float32 statistics": True,
}
_OPTIONS = ("eps", "momentum", "affine", "track_running_stats", "process_group")
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)
_PACKAGE = "syncnorm:"


@dataclass(frozen=True)
class Subject:
    """A layer class under verification.

    Args:
        reference: `package:Class`, imported on each worker.
        accepted: arguments that its constructor takes, besides the number of channels.
        claims: what it offers: names of such arguments, and "mask", "messages" (one of 2C+1 numbers forward, one of 2C
            backward), "renorm", "double backward", "compile", "float32 statistics" (also of a half layer).
    """

    reference: str
    accepted: frozenset[str]
    claims: frozenset[str]

    @property
    def name(self) -> str:
        """The class's own name."""
        return self.reference.partition(":")[2]

    @property
    def is_renorm(self) -> bool:
        """Whether it renormalises: then its truth is another one."""
        return "renorm" in self.claims

    def make(self, num_features: int, **options: Any) -> nn.Module:
        """Build a layer with those of the options that its constructor takes."""
        if self.is_renorm:
            bounds = options.pop("bounds", BOUNDS)
            options = {"schedule": RenormSchedule.constant(*bounds), **options}
        given = {"eps": 1e-5, "momentum": 0.1, "affine": True, **options}
        return load(self.reference)(num_features, **{k: v for k, v in given.items() if k in self.accepted})

    def lacks(self, needs: tuple[str, ...]) -> str | None:
        """Why a check with these needs is not offered; None if it is."""
        for need in needs:
            wanted = need.removeprefix("no ")
            if (wanted in self.claims) == need.startswith("no "):
                return f"{self.name} {'renormalises' if need == 'no renorm' else f'does not claim {wanted}'}"
        return None


def subject_of(reference: str) -> Subject:
    """Look at a class; what is not ours claims what its signatures show.

    Raises:
        ConfigError: there is no such class, or it is no layer.
    """
    cls = load(reference)
    accepted = _accepted(cls)
    claims = accepted & set(_OPTIONS)
    if issubclass(cls, SyncNorm):
        claims |= {claim for claim, is_claimed in _OURS.items() if is_claimed}
    elif "mask" in inspect.signature(cls.forward).parameters:
        claims.add("mask")
    if issubclass(cls, SyncBatchRenorm):
        claims = (claims | {"renorm"}) - {"track_running_stats"}
    return Subject(reference, frozenset(accepted), frozenset(claims))


def _accepted(cls: type[nn.Module]) -> set[str]:
    """Names of the arguments of a constructor; with **kwargs also those of the class that it extends."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            names |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
            if not any(p.kind == p.VAR_KEYWORD for p in parameters):
                break
    return names


def ours() -> list[Subject]:
    """Both of our layers."""
    return [subject_of(f"{_PACKAGE}{cls.__name__}") for cls in (SyncBatchNorm, SyncBatchRenorm)]


def load(reference: str) -> type[nn.Module]:
    """Import a layer class.

    Raises:
        ConfigError: the reference is none, or names no layer class.
    """
    if not _REFERENCE.fullmatch(reference):
        raise ConfigError(
            f"`--layer` must be package.module:Class, got {reference!r}. For example torch.nn:SyncBatchNorm."
        )
    module, _, name = reference.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # whatever the module does as it is run
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"`--layer` must name what can be imported, got {reference!r}: {cause}. "
            "Put its folder on PYTHONPATH, or work in that folder."
        ) from None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"`--layer` must name a class of torch.nn.Module, got {reference!r}: {found!r}.")
    return found


Layer = Callable[..., Tensor]
"""From x, and a mask where there is one, to y."""
