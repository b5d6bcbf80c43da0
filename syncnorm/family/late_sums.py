"""Sums over the workers that nobody waits for in the step that sends them.

They are applied before the next training forward, and before anybody reads the statistics. What is
wrong with one is raised in the next training forward, when all workers are there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from syncnorm import tracing
from syncnorm.comm import exchange
from syncnorm.errors import FaultError, InputError
from syncnorm.family.layer import Pooling


class LateSums:
    """The sums of one layer that are under way. Copies and pickles with none."""

    def __init__(self) -> None:
        self._under_way: deque[tuple[exchange.Pending, Callable[[Tensor], None]]] = deque()
        self.failure: exchange.Failure | None = None
        """The failed exchange that the statistics lack; raised when all are there."""
        self._has_fault = False
        self._is_settling = False

    def send(
        self, sums: Tensor, layer: Pooling, kind: str, apply: Callable[[Tensor], None]
    ) -> None:
        """Start to sum over the layer's workers.

        *Collectives*: one asynchronous all-reduce; every worker must call.

        Args:
            sums: float64, the last number a count.
            layer: whose workers, and whose name in errors.
            kind: what is sent, see `syncnorm.comm.exchange`.
            apply: called with the total, after those that were sent before.
        """
        pending = exchange.start_sum(sums, layer.group, kind, layer.label)
        self._under_way.append((pending, apply))

    @torch.no_grad()
    def settle(self) -> None:
        """Wait for what is under way and apply it. Starts no exchange, and raises nothing.

        What is applied may look at buffers, which settle when they are looked at.
        """
        if self._is_settling:
            return
        self._is_settling = True
        try:
            while self._under_way:
                pending, apply = self._under_way.popleft()
                total = pending.settle()
                if total is None:
                    self.failure = pending.failure
                elif is_faulty(total):
                    self._has_fault = True
                else:
                    apply(total)
        finally:
            self._is_settling = False

    def begin(self, layer: Pooling) -> None:
        """Begin a training forward: settle, and raise what was wrong. Every worker must call.

        Raises:
            FaultError: some worker's data was at fault.
            ExchangeError: some worker sent something else than the others, or a sum broke.
        """
        self.settle()
        failure, self.failure = self.failure, None
        if failure is not None and layer.group is not None:
            exchange.raise_failure(failure, layer.group)
        has_fault, self._has_fault = self._has_fault, False
        if has_fault:
            raise mask_fault(layer)

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return {**self.__dict__, "failure": None}


def same_buffers(layer: Pooling) -> Callable[[], None]:
    """Note a layer's buffers in a forward, for a backward pass that reads or writes them.

    Returns:
        What raises InputError where the layer has others by then.
    """
    before = dict.copy(layer._buffers)  # past `CurrentBuffers`, which may wait

    def check() -> None:
        now = layer._buffers
        if any(dict.get(now, name) is not buffer for name, buffer in before.items()):
            raise InputError(
                f"the backward pass of {layer.label} must find the buffers of its forward, whose "
                "averages are in the gradient, got others, as after torch.func.functional_call. "
                "Load them into a copy of the layer."
            )

    return check


def keep(layer: Pooling, total: Tensor, **values: Tensor) -> None:
    """Write buffers of a layer that follow a sum over the workers.

    They stay where nobody has samples, and where the sum, or what would be written, is not finite,
    as in a step that gradient scaling gives up.

    Args:
        layer: that has the buffers.
        total: the sum, its count last.
        values: by name.
    """
    buffers = [layer.get_buffer(name) for name in values]
    written = [
        value.to(buffer.dtype) for buffer, value in zip(buffers, values.values(), strict=True)
    ]
    is_new = (total[-1] > 0) & total.isfinite().all()
    for value in written:
        is_new = is_new & value.isfinite().all()
    for buffer, value in zip(buffers, written, strict=True):
        buffer.copy_(torch.where(is_new, value, buffer))


def is_faulty(total: Tensor) -> bool:
    """True if the count, the last number, is none: some worker's mask was wrong.

    On other devices nobody looks; statistics stay where the count is not above 0.
    """
    return tracing.is_readable(total) and bool(total[-1].isnan())


def mask_fault(layer: Pooling) -> FaultError:
    """Make the error of a wrong mask, the same on all workers."""
    return FaultError(
        f"`mask` must hold finite weights >= 0, in {layer.label}. No statistics were updated."
    )
