"""Handover of the latest state from one worker to the others, at the end of `join`."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from syncnorm.comm import exchange, groups
from syncnorm.errors import InputError
from syncnorm.family.layer import Pooling
from syncnorm.module import SyncNorm

# The modules of torch's optimizers whose steps exchange parameters. Not imported: few have them.
_STEPPING_TOGETHER = {
    "torch.distributed.optim.post_localSGD_optimizer",
    "torch.distributed.optim.zero_redundancy_optimizer",
}


class Stateful(Protocol):
    """An object whose state can be handed over, such as an optimizer or a counter of the user's."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


def check(stateful: Sequence[Stateful]) -> None:
    """Raise InputError unless all have a state, which they keep without collectives of their own."""
    for each in stateful:
        if any(base.__module__ in _STEPPING_TOGETHER for base in type(each).__mro__):
            raise InputError(
                "`stateful` must exchange nothing where workers may run out of data, got "
                f"{type(each).__name__} of torch.distributed, whose steps the workers make together. "
                "Use an optimizer that each worker has whole, or give the workers equally many "
                "batches, empty ones if need be."
            )
        if not (hasattr(each, "state_dict") and hasattr(each, "load_state_dict")):
            raise InputError(
                "`stateful` must have the methods state_dict and load_state_dict, got "
                f"{type(each).__name__}. Give it both, or change it after the block, on all "
                "workers alike."
            )


@dataclass
class Handover:
    """One handover to the workers whose state is older. All make the same exchanges.

    Args:
        group: all workers.
        device: of the messages.
        is_giver: True if this worker's state is given.
        is_late: True if this worker's state is older.
    """

    group: groups.Group
    device: torch.device
    is_giver: bool
    is_late: bool

    def give(self, layers: Sequence[SyncNorm | Pooling], stateful: Sequence[Stateful]) -> None:
        """Hand over the running statistics of the layers, and the states.

        Raises:
            InputError: a state cannot be read by the receivers; the same on all workers.
        """
        for layer in layers:
            layer.settle()
        buffers = [b for layer in layers for b in layer.buffers(recurse=False)]
        if buffers:
            wide = torch.cat([b.detach().to(self.device, torch.float64).flatten() for b in buffers])
            given = self._from_giver(wide)
            if self.is_late:
                for buffer, value in zip(
                    buffers, given.split([b.numel() for b in buffers]), strict=True
                ):
                    buffer.copy_(value.view_as(buffer))
        states = [self._give_state(each) for each in stateful]
        if self.is_late:
            # After all exchanges: a state that does not fit raises here alone, and no worker waits.
            for each, state in zip(stateful, states, strict=True):
                each.load_state_dict(_unpacked(state.cpu().to(torch.int32)))

    def _give_state(self, stateful: Stateful) -> Tensor:
        """The giver's state as bytes. Four travel as an int32 in a float64, which is exact."""
        data = _packed(stateful) if self.is_giver else None
        length = -1.0 if data is None else float(data.numel())
        size = int(
            self._from_giver(torch.full((1,), length, dtype=torch.float64, device=self.device))
        )
        if size < 0:
            raise InputError(
                "`stateful` must have a state that torch.load(weights_only=True) takes, got "
                f"another of {type(stateful).__name__}. Let its state_dict hold tensors, numbers, "
                "texts, lists and dicts."
            )
        wide = torch.zeros(size) if data is None else data
        return self._from_giver(wide.to(self.device, torch.float64))

    def _from_giver(self, numbers: Tensor) -> Tensor:
        return exchange.sum_(
            numbers if self.is_giver else torch.zeros_like(numbers), self.group, "join"
        )


def _packed(stateful: Stateful) -> Tensor | None:
    """The state in numbers of four bytes; None if the receivers could not read it."""
    file = io.BytesIO()
    try:
        torch.save(stateful.state_dict(), file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # whatever a user's object may raise: all workers raise together
        return None
    file.seek(0, io.SEEK_END)
    file.write(bytes(-file.tell() % 4))
    return torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.int32)


def _unpacked(data: Tensor) -> Any:
    # weights_only: no code of the message can run.
    file = io.BytesIO(ctypes.string_at(data.data_ptr(), 4 * data.numel()))
    return torch.load(file, map_location="cpu", weights_only=True)
