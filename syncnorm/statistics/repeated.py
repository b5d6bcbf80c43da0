"""Training forwards that activation checkpointing repeats in the backward pass.

A repetition must see what the first forward saw, and change nothing: it takes the statistic that
was kept, exchanges nothing and updates nothing. The first forward is found by its local sums and
some of its input, bit by bit; of several that are equal, the newest that was not repeated yet.

What is kept lives as long as it can be needed: as long as the graph of the first forward, or, where
there is none (the re-entrant kind of checkpointing), while it is among the last 64 of its layer.
Where more than these were pending, a statistic that depends on the batch alone is made again, by an
exchange that all workers make, since all count alike; any other is an error.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from syncnorm import undocumented
from syncnorm.autograd import GradientMeans
from syncnorm.errors import InputError
from syncnorm.ops import LocalSums, Statistic

# So many calls of a layer may await their repetition without a graph.
_PENDING_CALLS = 64


@dataclass(eq=False)
class Call:
    """A training forward that may be repeated."""

    key: Tensor
    """By which a repetition finds it, float64."""
    statistic: Statistic
    number: int
    """Counts the calls of a layer that were kept."""
    repeated_in: int | None = None
    """The backward pass that has repeated it last."""


class Repetitions:
    """The calls of one layer that may be repeated; none of them in a copy or a pickle."""

    def __init__(self) -> None:
        self._in_graphs: weakref.WeakKeyDictionary[GradientMeans, Call]
        self._in_graphs = weakref.WeakKeyDictionary()
        self._pending: deque[Call] = deque(maxlen=_PENDING_CALLS)
        self._has_overflowed = False
        self._count = 0

    def __len__(self) -> int:
        return len(self._pending) + len(self._in_graphs)

    def keep(self, x: Tensor, y: Tensor, local: LocalSums, statistic: Statistic) -> None:
        """Keep the statistic of a first forward from x to y.

        Called only where `ops.may_be_repeated()`.
        """
        # The graph holds the statistic's gradient means; what it keeps alive must not hold them.
        again = statistic._replace(gradient_means=statistic.gradient_means.again())
        self._count += 1
        call = Call(_key(x, local), again, self._count)
        if y.requires_grad:
            self._in_graphs[statistic.gradient_means] = call
            return
        if len(self._pending) == _PENDING_CALLS and self._pending[0].repeated_in is None:
            self._has_overflowed = True
        self._pending.append(call)

    def find(self, x: Tensor, local: LocalSums, name: str) -> Statistic | None:
        """The statistic of the forward that the present one repeats; None: it is to be made again.

        Raises:
            InputError: more were pending than can be kept.
        """
        calls = [*self._pending, *self._in_graphs.values()]
        calls.sort(key=lambda call: -call.number)
        if not calls or (self._has_overflowed and calls[0].statistic.is_of_batch_alone):
            return None
        call = calls[0] if len(calls) == 1 else self._newest(calls, _key(x, local), name)
        call.repeated_in = undocumented.backward_pass()
        return call.statistic

    def _newest(self, calls: list[Call], key: Tensor, name: str) -> Call:
        """The newest call of this key that was not repeated yet; of any, where none has the key."""
        equal = [call for call in calls if torch.equal(_bits(call.key), _bits(key))]
        if not equal and self._has_overflowed:
            raise InputError(
                f"`checkpoint` must repeat one of the last {_PENDING_CALLS} training forwards of a "
                f"layer, got none of them in {name}. Make the backward pass sooner, or checkpoint "
                "fewer calls of this layer."
            )
        # A forward that is not repeated to the bit has another key.
        equal, now = equal or calls, undocumented.backward_pass()
        others = [call for call in equal if call.repeated_in != now]
        return next((call for call in others if call.repeated_in is None), (others or equal)[0])

    def __reduce__(self) -> tuple[Any, ...]:
        # What awaits a backward pass awaits it of this layer, not of a copy.
        return Repetitions, ()


def _key(x: Tensor, local: LocalSums) -> Tensor:
    """The local sums, and the first value of each channel."""
    if x.numel() == 0:
        return local.sums
    return torch.cat([local.sums, x.detach()[0].reshape(x.shape[1], -1)[:, 0].double()])


def _bits(key: Tensor) -> Tensor:
    """The key as integers: as such, NaN equals itself."""
    return key.view(torch.int64)
