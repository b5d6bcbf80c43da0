"""The one kind of message: float64 numbers, summed over the workers of a group.

Every exchange of the library passes through here, where it is counted and timed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange(NamedTuple):
    """One message as its sender saw it."""

    kind: str
    """What it carried: "moments", "gradients", "fault", "count"; "all moments", "all gradients" of a model."""
    numel: int
    """How many float64 numbers."""
    seconds: float
    """How long the caller was held up (on CUDA: the time to enqueue it)."""


_records: list[list[Exchange]] = []


@contextmanager
def record() -> Iterator[list[Exchange]]:
    """Collect the exchanges that this process makes within the block, in order.

    >>> with record() as exchanges:
    ...     pass
    >>> len(exchanges)
    0
    """
    exchanges: list[Exchange] = []
    _records.append(exchanges)
    try:
        yield exchanges
    finally:
        # By identity: two lists of equal content are not the same record.
        _records[:] = [r for r in _records if r is not exchanges]


def sum_(message: Tensor, group: dist.ProcessGroup | None, kind: str) -> Tensor:
    """Replace `message` (float64) by its sum over `group`, the same bits on every worker. None: nothing to do.

    *Collectives*: one all-reduce of `message.numel()` float64 numbers; every member of `group` must call.
    """
    if group is None:
        return message
    assert message.dtype == torch.float64
    start = time.perf_counter()
    dist.all_reduce(message, group=group)
    _note(kind, message, start)
    return message


class Pending:
    """A sum under way. Copies and pickles as its result."""

    def __init__(self, message: Tensor, work: dist.Work | None) -> None:
        self._message = message
        self._work = work

    def wait(self) -> Tensor:
        """The sum over the group; on CUDA ordered before what the current stream does next."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._message

    def __getstate__(self) -> dict[str, Tensor | None]:
        return {"_message": self.wait(), "_work": None}


def start_sum(message: Tensor, group: dist.ProcessGroup | None, kind: str) -> Pending:
    """Begin to sum `message` (float64) over `group`; it must be left alone until waited for.

    *Collectives*: one asynchronous all-reduce of `message.numel()` float64 numbers; every member must call.
    """
    if group is None:
        return Pending(message, None)
    assert message.dtype == torch.float64
    start = time.perf_counter()
    work = dist.all_reduce(message, group=group, async_op=True)
    _note(kind, message, start)
    return Pending(message, work)


def gather(message: Tensor, group: dist.ProcessGroup | None, kind: str) -> Tensor:
    """The messages of all workers, stacked by rank: shape (world size, *message.shape)."""
    if group is None:
        return message.unsqueeze(0)
    start = time.perf_counter()
    parts = [torch.empty_like(message) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, message, group=group)
    _note(kind, message, start)
    return torch.stack(parts)


def _note(kind: str, message: Tensor, start: float) -> None:
    done = Exchange(kind, message.numel(), time.perf_counter() - start)
    for exchanges in _records:
        exchanges.append(done)
