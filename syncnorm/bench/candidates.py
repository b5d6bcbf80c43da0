"""The layers that are compared, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from syncnorm.bench.naive import NaiveSyncBatchNorm
from syncnorm.layers import SyncBatchNorm, SyncBatchRenorm
from syncnorm.verify.under_test import layer_under_test, load

LOCAL = "local"
_TORCH = "nn.SyncBatchNorm"
MODES = ("sync=none", "sync=running", "sync=lagged", "sync=batch")
_LAYERS: dict[str, Callable[[int], nn.Module]] = {
    _TORCH: nn.SyncBatchNorm,
    "naive": NaiveSyncBatchNorm,
    **{mode: partial(SyncBatchNorm, sync=mode.removeprefix("sync=")) for mode in MODES},
    **{
        f"renorm, sync={sync}": partial(SyncBatchRenorm, sync=sync) for sync in ("running", "batch")
    },
}
# Modes whose messages are sent between steps are none for a compiler, and compiling takes its time.
_COMPILED = (LOCAL, "naive", "sync=none", "sync=batch", "renorm, sync=batch")


@dataclass(frozen=True)
class Candidate:
    """A layer, eager or compiled.

    Args:
        layer: one of ours by its name here, or `package:Class`.
        is_compiled: by torch.compile.
        dimensions: of the inputs that it takes.
    """

    layer: str
    is_compiled: bool = False
    dimensions: tuple[int, ...] = (2, 4)

    @property
    def name(self) -> str:
        return f"{self.layer}, compiled" if self.is_compiled else self.layer

    def make(self, channels: int, ndim: int = 4) -> nn.Module:
        """Build the layer for inputs of `ndim` dimensions."""
        if self.layer == LOCAL:
            return nn.BatchNorm1d(channels) if ndim == 2 else nn.BatchNorm2d(channels)
        return (_LAYERS.get(self.layer) or load(self.layer))(channels)


def candidates(layers: Sequence[str], device: str, compiles: bool) -> list[Candidate]:
    """Every candidate, the local layer first.

    Args:
        layers: `package:Class`, in addition to the built-in ones.
        device: "cpu" leaves out torch's SyncBatchNorm, which takes CUDA tensors only.
        compiles: take compiled ones, too.

    Raises:
        ConfigError: a layer cannot be imported, or is none.
    """
    eager = [Candidate(LOCAL)]
    eager += [Candidate(name) for name in _LAYERS if name != _TORCH or device == "cuda"]
    given = [Candidate(name, False, layer_under_test(name).dimensions) for name in layers]
    if not compiles:
        return eager + given
    compiled = [Candidate(one.layer, True) for one in eager if one.layer in _COMPILED]
    return [*eager, *given, *compiled, *(Candidate(g.layer, True, g.dimensions) for g in given)]
