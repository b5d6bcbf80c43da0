"""Counts and times of the exchanges that this process makes: each of a block, or sums by kind."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple


class Exchange(NamedTuple):
    """One message as its sender saw it."""

    kind: str
    """The payload: "moments", "gradients", "second" (derivatives), "fault", "count", and "sums" of a
    layer of the family; "all moments", "all gradients" of a model; "rows" of `gather`, "population"
    of `recalibrate`, "targets" and "least squares" of `merge`, "monitor" of `monitor`, "diagnosis"
    of `diagnose`, "agreement" before anything is pooled, "join" of `join`; "notes", "counts of ..."
    and "used parameters" of the trainer; "no data" for the zeros of a rank that has none."""
    numel: int
    """Float64 numbers sent, identity and padding included (see `exchange.size_of`)."""
    seconds: float
    """The time that the caller was held up (on CUDA: the time to enqueue it)."""


class _Record(list[Exchange]):
    """The exchanges of a block."""

    def add(self, kind: str, count: int, numbers: int, seconds: float) -> None:
        if count:
            self.append(Exchange(kind, numbers, seconds))


@contextmanager
def record() -> Iterator[list[Exchange]]:
    """Collect the exchanges that this process makes within the block, in order.

    >>> with record() as exchanges:
    ...     pass
    >>> len(exchanges)
    0
    """
    exchanges = _Record()
    watchers.append(weakref.ref(exchanges))
    try:
        yield exchanges
    finally:
        # By identity: two lists of equal content are not the same record.
        watchers[:] = [each for each in watchers if each() is not exchanges]


@dataclass
class Total:
    """The sum of the exchanges of one kind."""

    count: int = 0
    numbers: int = 0
    """Float64 numbers sent."""
    seconds: float = 0.0
    """The time that the caller was held up, waiting for pending sums included."""

    def add(self, count: int, numbers: int, seconds: float) -> None:
        self.count += count
        self.numbers += numbers
        self.seconds += seconds


class Tally:
    """Adds up the exchanges that this process makes, by kind, for as long as the tally lives."""

    def __init__(self) -> None:
        self._totals: dict[str, Total] = {}
        watchers.append(weakref.ref(self, watchers.remove))

    def add(self, kind: str, count: int, numbers: int, seconds: float) -> None:
        self._totals.setdefault(kind, Total()).add(count, numbers, seconds)

    def take(self) -> dict[str, Total]:
        """Return the totals by kind since the last call."""
        totals, self._totals = self._totals, {}
        return totals


# A list, as every exchange looks through it: to iterate over a WeakSet takes longer than to count.
watchers: list[weakref.ref[Tally] | weakref.ref[_Record]] = []
"""The tallies that want to know of exchanges: mostly none."""


def tell(kind: str, count: int, numbers: int, start: float) -> None:
    """Tell the watchers of an exchange that the caller has waited for since `start`.

    Args:
        kind: the payload, see `Exchange`.
        count: 1; 0 for the further wait for one that they know of.
        numbers: sent, beside those that they know of.
        start: by `time.perf_counter`.
    """
    seconds = time.perf_counter() - start
    for each in tuple(watchers):
        if (watcher := each()) is not None:
            watcher.add(kind, count, numbers, seconds)
