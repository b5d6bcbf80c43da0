"""The state of one worker given to the others, at the end of `join`."""

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
from syncnorm.module import SyncNorm


class Stateful(Protocol):
    """Anything that can be handed over: an optimizer, a scheduler, a GradScaler, an AveragedModel, a user's
    own counter.
    """

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


def check(stateful: Sequence[Stateful]) -> None:
    for each in stateful:
        if not (hasattr(each, "state_dict") and hasattr(each, "load_state_dict")):
            raise InputError(
                "`stateful` must have the methods state_dict and load_state_dict, got "
                f"{type(each).__name__}. Give it both, or change it after the block, on all "
                "workers alike."
            )


@dataclass
class Handover:
    """From one worker to those whose state is older. All make the same exchanges.

    Args:
        group: all workers.
        device: where their messages are.
        is_giver: whether this worker's state is given.
        is_late: whether this worker's state is older.
    """

    group: groups.Group
    device: torch.device
    is_giver: bool
    is_late: bool

    def give(self, layers: Sequence[SyncNorm], stateful: Sequence[Stateful]) -> None:
        """The running statistics of the layers, and the states.

        Raises:
            InputError: a state cannot be read on the other side; the same on all workers.
        """
        for layer in layers:
            layer.statistics.settle()
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
            # After all exchanges: one that does not fit raises here alone, and leaves nobody
            # waiting.
            for each, state in zip(stateful, states, strict=True):
                each.load_state_dict(_unpacked(state.cpu().to(torch.int32)))

    def _give_state(self, stateful: Stateful) -> Tensor:
        """Its state as bytes, four in the place of a number: that is exact."""
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
    """Its state in numbers of four bytes; None if it could not be read on the other side."""
    file = io.BytesIO()
    try:
        torch.save(stateful.state_dict(), file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # of whatever a user's object may raise: all workers raise together
        return None
    file.seek(0, io.SEEK_END)
    file.write(bytes(-file.tell() % 4))
    return torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.int32)


def _unpacked(data: Tensor) -> Any:
    # Nothing but tensors and plain values is read: no code that came from outside can run.
    file = io.BytesIO(ctypes.string_at(data.data_ptr(), 4 * data.numel()))
    return torch.load(file, map_location="cpu", weights_only=True)
