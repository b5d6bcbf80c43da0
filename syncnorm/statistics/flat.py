"""One asynchronous message for all layers of a model: packed, sent, waited for, split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from syncnorm.comm import debug, exchange, groups
from syncnorm.device import is_host, layer_device
from syncnorm.maths.precision import sum_dtype
from syncnorm.statistics.buffers import Marks, mark

if TYPE_CHECKING:
    from syncnorm.module import SyncNorm


class Arrived(NamedTuple):
    """The sums over all workers."""

    parts: list[Tensor]
    """One for each layer, where its sums are."""
    rest: Tensor
    """The sum of what was sent besides."""


class FlatMessage:
    """A sum over the workers of one part for each layer, on its way.

    *Collectives*: one all-reduce, which nobody waits for until `wait`. Every worker must start it.

    Args:
        layers: by name, in the same order on all workers.
        parts: float64 by name, one tensor or several for each layer, of 2C+1 numbers together;
            zeros stand for those that are missing.
        rest: float64, what travels besides; None: nothing.
        group: the workers.
        kind: what it carries, for errors and the tally.
        written: buffers that the arrival will write. `marks` tells whether somebody else wrote
            them meanwhile.
    """

    layers: list[SyncNorm]

    def __init__(
        self,
        layers: Mapping[str, SyncNorm],
        parts: Mapping[str, Sequence[Tensor]],
        rest: Tensor | None,
        group: groups.Group | None,
        kind: str,
        written: Sequence[str],
    ) -> None:
        self.layers = list(layers.values())
        self.marks: Marks = mark(self.layers, written)
        device = layer_device(self.layers[0])
        self._devices = [
            parts[name][0].device if name in parts else layer_device(layer)
            for name, layer in layers.items()
        ]
        packed: list[Tensor] = []
        for name, size in zip(layers, sizes(self.layers), strict=True):
            if name not in parts:
                packed.append(zeros(size, device))
                continue
            for t in parts[name]:
                packed.append(t.to(device))
        packed += [] if rest is None else [rest]
        self._pending = exchange.start_sum(torch.cat(packed), group, kind, title(list(layers)))

    @property
    def failure(self) -> exchange.Failure | None:
        """Set by `settle` where it failed: raised when all are there again."""
        return self._pending.failure

    def settle(self) -> Arrived | None:
        """Wait for the sums; None if they failed. Starts no exchange, and raises nothing."""
        message = self._pending.settle()
        if message is None:
            return None
        count = sizes(self.layers)
        count.append(message.numel() - sum(count))
        *parts, rest = message.split(count)
        if not (is_host(message) or debug.is_on):
            # A count of NaN is a fault that nobody looks at: no layer is to follow, since those
            # behind the faulty one have NaN for data.
            is_bad = torch.stack([part[-1] for part in parts]).isnan().any()
            *parts, _ = torch.where(is_bad, torch.nan, message).split(count)
        return Arrived([p.to(d) for d, p in zip(self._devices, parts, strict=True)], rest)


def sizes(layers: Iterable[SyncNorm]) -> list[int]:
    """2C+1 for each layer."""
    return [2 * layer.num_features + 1 for layer in layers]


def title(names: Sequence[str]) -> str:
    """The name of all layers together, in errors."""
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def zeros(size: int, device: torch.device) -> Tensor:
    """`size` zeros, in the type of sums."""
    return torch.zeros(size, dtype=sum_dtype(device), device=device)
