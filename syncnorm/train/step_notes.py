"""The workers' notes of a step: losses, counts, flags and buffers' layouts, in one sum.

The notes decide whether the optimizer steps, so the host has to read them in every step. They are
sent when the host is through with the backward pass, which is when workers of one host come
together anyway. On CUDA they have a stream of their own, on which they wait for the forward pass
alone: while the host reads them, the device is busy with the backward pass, and the optimizer's
work comes in time. Over several workers they come after the sums of the layers' backward pass, as
NCCL runs what is sent by one communicator in the order of the calls: with `sync="batch"` near its
end, with "running" after the statistics.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from syncnorm.comm import exchange, groups
from syncnorm.train.setup import Setup
from syncnorm.train.task import Number

_FLAGS = 4


@dataclass(frozen=True)
class Flags:
    """The surroundings' wishes.

    Args:
        stop: True if this worker was asked to stop.
        save: True if this worker finds that it is time to save.
    """

    stop: bool = False
    save: bool = False


@dataclass(frozen=True)
class Notes:
    """The notes of all workers.

    Args:
        losses: each worker's sum of losses, in rank order.
        counts: each worker's count of what its loss is over, in rank order.
        stop: True if some worker was asked to stop.
        save: True if it is time to save.
        failed: True if some worker's samples could not be read.
        lack: True if some worker lacks the gradient of some parameter.
        are_alike: True if the shared buffers have the same types and shapes on all workers.
    """

    losses: list[float]
    counts: list[float]
    stop: bool
    save: bool
    failed: bool
    lack: bool
    are_alike: bool


class PendingNotes:
    """The notes of a step, to be exchanged after its backward pass.

    The payload is float64: four flags, a loss and a count for each rank and, if the model has
    buffers of its own, a checksum of their layout for each rank. Each worker fills in its own
    numbers.

    Args:
        setup: of the run.
        loss: this worker's sum of losses, shape ().
        count: of what the loss is over.
    """

    def __init__(self, setup: Setup, loss: Tensor, count: Number) -> None:
        rank, self._world_size = setup.workers.rank, setup.workers.world_size
        size = _FLAGS + self._world_size * (3 if setup.shared_buffers else 2)
        self._loss, self._count = loss, count  # kept: another stream reads them
        if loss.is_cuda:
            _stream(loss.device).wait_stream(torch.cuda.current_stream(loss.device))
        with self._aside():
            self._payload = torch.zeros(size, dtype=torch.float64, device=loss.device)
            mine = self._payload[_FLAGS + rank :: self._world_size]
            mine[0].copy_(loss)
            # Filled rather than assigned: that would copy a number from the host, and wait.
            if isinstance(count, Tensor):
                mine[1].copy_(count)
            else:
                mine[1].fill_(float(count))
            if setup.shared_buffers:
                mine[2].fill_(float(setup.shared_buffers.layout_checksum()))

    def exchange(self, flags: Flags, *, failed: bool, lacks: bool) -> Notes:
        """Tell all workers, and wait for their notes.

        *Collectives*: one sum; every worker must make it.

        Args:
            flags: of this worker.
            failed: True if this worker's samples could not be read.
            lacks: True if this worker lacks the gradient of some parameter.

        Raises:
            ExchangeError: it broke, or the workers are in different exchanges; then on all.
        """
        with self._aside():
            for place, is_set in enumerate((flags.stop, flags.save, failed, lacks)):
                if is_set:
                    self._payload[place].fill_(1.0)
            total = exchange.sum_(self._payload, groups.statistics_group(), "notes")
            stop, save, any_failed, lack, *numbers = total.tolist()
        size = self._world_size
        losses, counts, checksums = numbers[:size], numbers[size : 2 * size], numbers[2 * size :]
        are_alike = len(set(checksums)) <= 1
        return Notes(losses, counts, stop > 0, save > 0, any_failed > 0, lack > 0, are_alike)

    def _aside(self) -> AbstractContextManager[object]:
        """Make the context of the notes' own stream, also for the memory that they take."""
        device = self._loss.device
        return torch.cuda.stream(_stream(device)) if device.type == "cuda" else nullcontext()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)  # a few numbers, that the host waits for
