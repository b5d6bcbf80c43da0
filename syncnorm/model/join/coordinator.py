"""The exchanges by which workers coordinate within `join`.

Every forward begins with a count of the workers that have data: three numbers summed over the
workers. Nothing else changes while all have data. Once one has run out, each exchange is preceded
by a header that announces its kind and size, and the reductions of gradients that have begun.
Workers without data match each of these with zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm.comm import exchange, groups, inflight
from syncnorm.device import layer_device
from syncnorm.errors import ExchangeError, FaultError, InputError
from syncnorm.family.layer import Pooling
from syncnorm.model.join.ddp import GRADIENTS, SYNC, Reductions
from syncnorm.model.join.handover import Handover, Stateful
from syncnorm.module import SyncNorm
from syncnorm.undocumented import after_backward, disable_dynamo, unseen_by_selective_checkpoint

_NEXT, _SUM, _GATHER, _REDUCE = 1, 2, 3, 4
_CODES = {"sum": _SUM, "native sum": _SUM, "gather": _GATHER}
# A header's code is preceded by the numbers of reductions, each a digit of this base.
_BASE = 64
# Flags take this many values. The number of the forward's part is multiplied by it.
_FLAG_VALUES = 16
_TRAINING = 1


@dataclass(eq=False)
class Part:
    """A module whose forwards are coordinated."""

    number: int
    """Its index in messages."""
    module: nn.Module
    layers: list[SyncNorm | Pooling]
    reductions: Reductions | None

    def flags(self, module: nn.Module) -> int:
        """The flags of the forward that now begins; 0: it exchanges nothing."""
        is_training = module.training or any(layer.training for layer in self.layers)
        if self.reductions is None:
            gradients = GRADIENTS if torch.is_grad_enabled() else 0
            return _TRAINING + gradients if is_training else 0
        flags = self.reductions.flags()
        return flags + _TRAINING if is_training else flags if flags & ~SYNC else 0


class Coordinator:
    """Coordinates workers that have data with those that have run out.

    Args:
        group: all workers.
    """

    def __init__(self, group: groups.Group) -> None:
        self.group = group
        self._members = groups.ranks(group)
        self._device = groups.device_for(group)
        self._parts: list[Part] = []
        self._layers: list[SyncNorm | Pooling] = []
        self._stateful: list[Stateful] = []
        self._skips_headers = False
        self._num_present = len(self._members)
        """Number of workers that have data."""
        self._unannounced: list[Part] = []
        """Models whose reductions the next header must announce."""
        self._unannounced_late: list[Part] = []
        """Models whose reductions must be announced at the end of the backward pass."""
        self._steps = 0
        """Number of forwards that this worker had data for."""
        self._is_aborted = False
        """True if all workers are informed of an error."""

    @contextmanager
    def register(
        self, model: nn.Module, layers: list[SyncNorm | Pooling], stateful: Sequence[Stateful]
    ) -> Iterator[None]:
        """Coordinate the forwards of `model` within the block; hand its state over at the end."""
        modules = [module for module in model.modules() if _is_part(module, model)]
        if any(part.module in modules for part in self._parts):
            raise InputError(
                "`model` must not be in a `join` already, got one within its own block. Use one block."
            )
        before = len(self._parts), len(self._layers), len(self._stateful)
        if layers:
            self._device = groups.device_for(self.group, layer_device(layers[0]))
        self._layers += layers
        self._stateful += stateful
        handles = [self._hook(module, layers) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for part in self._parts[before[0] :]:
                if part.reductions is not None:
                    part.reductions.close()
            for some, count in zip(
                (self._parts, self._layers, self._stateful), before, strict=True
            ):
                del some[count:]

    def _hook(self, module: nn.Module, layers: list[SyncNorm | Pooling]) -> Any:
        part = Part(len(self._parts), module, layers, None)
        if isinstance(module, DistributedDataParallel):
            part.reductions = Reductions(module, partial(self._on_reduction, part), self._share)
        self._parts.append(part)
        return module.register_forward_pre_hook(
            disable_dynamo(unseen_by_selective_checkpoint(partial(self._on_forward, part))),
            prepend=True,
        )

    def _share(self) -> float:
        return len(self._members) / self._num_present

    @property
    def _has_absent(self) -> bool:
        return self._num_present < len(self._members)

    def _on_forward(self, part: Part, module: nn.Module, args: object) -> None:
        """Count the workers that have data. This one has, since it begins a forward."""
        flags = part.flags(module)
        if not flags:
            if part.reductions is not None:
                part.reductions.set_has_absent(False)  # else DDP has an exchange of its own
            return
        self._count_present(1.0, part.number * _FLAG_VALUES + flags)
        self._steps += 1
        if part.reductions is not None:
            part.reductions.set_has_absent(self._has_absent)
            part.reductions.forward(flags)

    def _on_reduction(self, part: Part) -> None:
        """Have a reduction of gradients announced, which begins in this backward pass."""
        if not self._has_absent:
            return
        assert part.reductions is not None
        (self._unannounced_late if part.reductions.is_known_late else self._unannounced).append(
            part
        )
        after_backward(self._announce_pending)

    def _announce_pending(self) -> None:
        """Announce the reductions that no header has announced yet."""
        self._unannounced += self._unannounced_late
        self._unannounced_late = []
        if self._unannounced:
            self._send_header(_REDUCE, 0)

    def announce(self, way: str, size: int, group: groups.Group) -> None:
        """Send a header before an exchange, once a worker has run out."""
        if self._skips_headers:
            return
        if group is not self.group:
            raise InputError(
                "`process_group` must be that of the model where workers may run out of data, got "
                f"ranks {groups.ranks(group)} in an exchange. Make it outside of the block."
            )
        if self._has_absent:
            self._send_header(_CODES[way], size)

    def abort(self, error: Exception) -> None:
        """Report an error that ends the block here to all others, in place of a header."""
        if not self._has_absent or self._is_aborted or isinstance(error, ExchangeError):
            return
        self._is_aborted = True
        with self._without_headers():
            # Not waited for: perhaps the others never make this exchange.
            exchange.start_sum(self._to_message(0.0, 0.0, 0.0, 1.0), self.group, "join")

    @torch.no_grad()
    def match_others(self) -> None:
        """Match the exchanges of the others until no worker has data, then take over the state."""
        has_any_data = self._count_present(0.0, 0)
        while has_any_data:
            code, numel = self._sum_header(0.0, 0.0, 0.0, 0.0)
            pending, code = divmod(code, _BASE)
            while pending:  # the reductions that have begun, see _send_header
                pending, number = divmod(pending, _BASE)
                self._reductions(number - 1).match_reduction()
            if code == _NEXT:
                has_any_data = self._sum_present(0.0, 0)
            elif code != _REDUCE:
                self._match_exchange(code, numel)
        for part in self._parts:
            if part.reductions is not None:
                part.reductions.wait()
                part.reductions.set_has_absent(False)
        self._num_present = len(self._members)
        with self._without_headers():
            self._hand_over()
        inflight.reset_calls(self.group)

    def _reductions(self, number: int) -> Reductions:
        reductions = self._parts[number].reductions
        assert reductions is not None
        return reductions

    def _match_exchange(self, code: int, numel: int) -> None:
        """Add zeros to an exchange of the others."""
        zeros = torch.zeros(numel, dtype=torch.float64, device=self._device)
        with self._without_headers():
            if code == _GATHER:
                exchange.gather(zeros, self.group, exchange.NO_DATA)
            else:
                exchange.sum_(zeros, self.group, exchange.NO_DATA)

    def _count_present(self, present: float, flags: int) -> int:
        """Count the workers that have data, announced by a header if some have run out."""
        if self._has_absent:
            self._send_header(_NEXT, 0)
        return self._sum_present(present, flags)

    def _sum_present(self, present: float, flags: int) -> int:
        """Sum presence, flags, squared flags: the flags are equal if n * sum f^2 = (sum f)^2."""
        count, total, squares = self._sum(present, float(flags), float(flags * flags))
        if count * squares != total * total:
            self._is_aborted = True
            raise FaultError(
                "Forwards within `join` must be alike on all workers that still have data, got "
                "different ones: of another model, in training or evaluation mode, with or without "
                "gradients, in no_sync or not. Evaluate under torch.no_grad(), or after the block."
            )
        self._num_present = round(count)
        if count and self._has_absent:
            number, flags = divmod(round(total / count), _FLAG_VALUES)
            reductions = self._parts[number].reductions
            if reductions is not None and reductions.learns_graph(flags):
                self._is_aborted = True
                raise FaultError(
                    "`static_graph=True` needs all workers in DistributedDataParallel's first step, "
                    f"got data on {self._num_present} of {len(self._members)}. Leave it out, or "
                    "make a first step with data on every worker."
                )
            if reductions is not None and not present:
                reductions.match_forward(flags)
        return self._num_present

    def _send_header(self, code: int, numel: int) -> None:
        """Announce the next exchange, and the reductions that have begun."""
        pending = 0
        for part in reversed(self._unannounced):
            pending = pending * _BASE + part.number + 1
        self._unannounced = []
        self._sum_header(1.0, float(pending * _BASE + code), float(numel), 0.0)

    def _sum_header(self, *numbers: float) -> tuple[int, int]:
        """Sum a header (presence, code, size, errors); the code and size of what it announces."""
        total, code, numel, errors = self._sum(*numbers)
        if errors:
            self._is_aborted = True
            raise ExchangeError(
                "the block of `join` must end alike on all workers that have data, got an error on "
                f"{errors:g} of {total + errors:g}. Look for the cause in their logs."
            )
        return round(code / total), round(numel / total)

    def _sum(self, *numbers: float) -> list[float]:
        """The sums of these numbers over the workers."""
        with self._without_headers():
            return exchange.sum_(self._to_message(*numbers), self.group, "join").tolist()

    def _to_message(self, *numbers: float) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64).to(self._device)

    @contextmanager
    def _without_headers(self) -> Iterator[None]:
        """Send no headers for exchanges within the block: they are headers or announced already."""
        before, self._skips_headers = self._skips_headers, True
        try:
            yield
        finally:
            self._skips_headers = before

    def _hand_over(self) -> None:
        """Hand over the state of a worker that had data for the most forwards."""
        rank = groups.rank()
        steps = self._sum(*(float(self._steps if r == rank else 0) for r in self._members))
        self._steps, mine = round(max(steps)), self._steps
        is_giver = self._members[steps.index(max(steps))] == rank
        for part in self._parts:
            if part.reductions is not None:
                part.reductions.hand_over(is_giver)
        Handover(self.group, self._device, is_giver, mine < self._steps).give(
            self._layers, self._stateful
        )


def _is_part(module: nn.Module, model: nn.Module) -> bool:
    return module is model or isinstance(module, DistributedDataParallel)
