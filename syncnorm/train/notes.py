"""The workers' notes of a step: their losses, stop flags and buffers' layouts, in one sum.

The notes decide whether the optimizer steps, so the host has to read them in every step. On CUDA
they have a stream of their own, on which they wait for the forward pass alone: while the host
reads them, the device is busy with the backward pass, and the optimizer's work comes in time.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from syncnorm.comm import exchange, groups
from syncnorm.train.setup import Setup


@dataclass(frozen=True)
class Notes:
    """The notes of all workers.

    Args:
        losses: each worker's share of the mean loss, in rank order.
        stop: True if some worker was asked to stop.
        are_alike: True if the shared buffers have the same types and shapes on all workers.
    """

    losses: list[float]
    stop: bool
    are_alike: bool


class PendingNotes:
    """The notes of a step on their way.

    The payload is float64: the stop flag, a loss for each rank and, if the model has buffers of its
    own, a checksum of their layout for each rank. Each worker fills in its own numbers.

    *Collectives*: one asynchronous sum; every worker must make it.

    Args:
        setup: of the run.
        loss: this worker's share of the step's mean loss, shape ().
        stop: True if this worker was asked to stop.
    """

    def __init__(self, setup: Setup, loss: Tensor, stop: bool) -> None:
        rank, self._world_size = setup.workers.rank, setup.workers.world_size
        size = 1 + self._world_size * (2 if setup.shared_buffers else 1)
        self._loss = loss  # kept: another stream reads it
        if loss.is_cuda:
            _stream(loss.device).wait_stream(torch.cuda.current_stream(loss.device))
        with self._aside():
            payload = torch.zeros(size, dtype=torch.float64, device=loss.device)
            # Filled rather than assigned: that would copy a number from the host, and wait.
            payload[0].fill_(float(stop))
            payload[1 + rank].copy_(loss)
            if setup.shared_buffers:
                checksum = float(setup.shared_buffers.layout_checksum())
                payload[1 + self._world_size + rank].fill_(checksum)
            self._pending = exchange.start_sum(payload, groups.statistics_group(), "notes")

    def read(self) -> Notes:
        """Wait for the notes.

        Raises:
            ExchangeError: they broke, or the workers are in different exchanges; then on all.
        """
        with self._aside():
            stops, *numbers = self._pending.wait().tolist()
        if self._pending.mixed is not None:
            group = groups.statistics_group()
            assert group is not None, "an exchange was made"
            exchange.raise_mixed(self._pending.mixed, group)
        losses, checksums = numbers[: self._world_size], numbers[self._world_size :]
        return Notes(losses, stops > 0, len(set(checksums)) == 1)

    def _aside(self) -> AbstractContextManager[object]:
        """Make the context of the notes' own stream, also for the memory that they take."""
        device = self._loss.device
        return torch.cuda.stream(_stream(device)) if device.type == "cuda" else nullcontext()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)  # a few numbers, that the host waits for
