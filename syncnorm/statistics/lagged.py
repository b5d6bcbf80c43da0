"""`sync="lagged"`: pooled statistics in both passes, and nobody waits for them.

A layer normalises by an average of the pooled moments up to the last step, and corrects its
gradient by an average of the pooled gradient means up to the last step. Two flat asynchronous
messages a step keep these up to date for all layers. A layer that drifts (see
`syncnorm.maths.lagged`) waits for pooling in the next step, as in the first.

As with `sync="batch"`, every worker must take the backward pass of the same calls. The message of
the backward pass leaves when each call of the step has been through it; where that cannot be
counted (forwards without gradients, re-entrant checkpointing), when the next training forward
begins. Both are points of the program, the same on all workers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from syncnorm import ops
from syncnorm.comm import exchange
from syncnorm.compiled import untraced
from syncnorm.errors import InputError
from syncnorm.maths import lagged
from syncnorm.maths.moments import Moments, of_sums, reciprocal
from syncnorm.module import Call, SyncNorm
from syncnorm.ops import LocalSums, PooledMeans, Statistic
from syncnorm.statistics.buffers import Marks, mark, written
from syncnorm.statistics.running import PooledRunning, device_of, zeros


class Averages(NamedTuple):
    """What a call of a layer saw of its averages; they move on before its backward pass if somebody
    settles.
    """

    waits: bool
    mean: Tensor
    var: Tensor
    gradient: Tensor


@dataclass
class Backward:
    """The backward pass of a step: which of its calls have been through."""

    expected: int = 0
    arrived: set[int] = field(default_factory=set)
    is_countable: bool = True
    is_due: bool = False
    """Whether the forward's message has left."""

    @property
    def is_complete(self) -> bool:
        return self.is_due and self.is_countable and 0 < self.expected == len(self.arrived)


class LaggedMeans:
    """The gradient means of one call: averages of earlier steps, or pooled now if the layer waits."""

    def __init__(
        self,
        owner: PooledLagged,
        layer: SyncNorm,
        estimate: Tensor,
        pooled: PooledMeans | None,
        count: Tensor,
    ) -> None:
        self.owner = owner
        self.layer = layer
        self.estimate = estimate
        self.pooled = pooled
        self.count = count
        self.backward = owner.expect()
        # Not id(self): a later call of the same step may be given the memory, and the id, of this
        # one.
        self.number = self.backward.expected if self.backward is not None else 0

    @property
    def is_local(self) -> bool:
        return False

    def __call__(self, local: Tensor) -> Tensor:
        self.owner.leave_gradients(self.layer, local, self.count, self.backward)
        means = self.estimate if self.pooled is None else self.pooled(local)
        self.owner.note_arrival(self.backward, self.number)
        return means

    def of_second(self, local: Tensor) -> Tensor:
        raise _no_second(self.layer)


class FixedMeans(NamedTuple):
    """The averages of earlier steps as the gradient means of a call that leaves no trace."""

    layer: SyncNorm
    estimate: Tensor

    @property
    def is_local(self) -> bool:
        return False

    def __call__(self, local: Tensor) -> Tensor:
        return self.estimate

    def of_second(self, local: Tensor) -> Tensor:
        raise _no_second(self.layer)


def _no_second(layer: SyncNorm) -> InputError:
    return InputError(
        '`sync` must be "batch", "running" or "none" where a gradient is differentiated, got '
        '"lagged" in layer '
        f"{layer.label!r}. Its gradient is corrected by an average and is no derivative of its "
        "output."
    )


class PooledLagged(PooledRunning):
    """The layers of one model that share two messages a step; their `statistics`.

    The layers hold the averages in buffers, so that a resumed run is exact: `lagged_mean`,
    `lagged_var` (C,), `lagged_gradient` (2, C), `lagged_waits` (), and how many values entered the
    averages, `lagged_updates` (2,).
    """

    def __init__(self, layers: dict[str, SyncNorm]) -> None:
        super().__init__(layers)
        self._backward = Backward()
        self._gradients: dict[str, Tensor] = {}
        self._late: dict[str, Tensor] = {}
        """Of steps whose message has left: two forwards before a backward pass, or two passes over
        one forward.
        """
        self._sent_gradients: tuple[exchange.Pending, list[Marks]] | None = None
        self._waits: dict[str, bool] | None = None

    def take(self, layer: SyncNorm, local: LocalSums, call: Call) -> Statistic:
        self._leave(layer, local, call)
        if call.averages is None:
            call.averages = self._averages(layer)
        averages: Averages = call.averages
        group, count, pooled = self.group, local.sums[-1], None
        if averages.waits:
            batch = of_sums(exchange.sum_(local.sums, group, "moments", layer.label))
            pooled = PooledMeans(batch, group, layer.label)
        else:
            # An average has no count of its own; any above 1 says that its variance is one.
            several = torch.full_like(count, 2.0)
            batch = Moments(several, averages.mean, averages.var * several)
        if call.is_frozen:
            means = pooled or FixedMeans(layer, averages.gradient)
        else:
            means = LaggedMeans(self, layer, averages.gradient, pooled, count)
        return Statistic(batch, means, is_pooled=group is not None)

    def settle(self) -> None:
        """Wait for what is under way and apply it. Starts no exchange."""
        super().settle()
        if self._sent_gradients is not None:
            self._apply_sent_gradients()

    @untraced
    def _apply_sent_gradients(self) -> None:
        assert self._sent_gradients is not None
        (pending, marks), self._sent_gradients = self._sent_gradients, None
        message = pending.wait()
        if pending.mixed is not None:
            self._mixed = pending.mixed
            return
        with torch.no_grad():
            parts = message.split(self._sizes())
            for layer, part, marked in zip(self.layers.values(), parts, marks, strict=True):
                part = part.to(device_of(layer))
                if not written(marked):
                    _follow_gradients(layer, part[:-1].view(2, -1), part[-1])

    def forget(self, layer: SyncNorm) -> None:
        super().forget(layer)
        for kept in (self._gradients, self._late):
            kept.pop(self._name(layer), None)
        self._waits = None

    def drop(self) -> None:
        super().drop()
        # Of a step whose forward's message has left, the backward's follows in any case.
        if not self._backward.is_due:
            self._backward = Backward()
            self._gradients = {}

    def start(self) -> None:
        if self._backward.is_due:
            self._launch_gradients()
        super().start()
        # Somebody may have written them since.
        self._waits = None

    def launch(self) -> None:
        super().launch()
        self._backward.is_due = True
        if self._backward.is_complete:
            self._launch_gradients()

    def expect(self) -> Backward | None:
        """The step whose backward pass the present call belongs to; None if it is repeated or has
        no gradient.
        """
        if ops.is_recomputing():
            return None
        if not torch.is_grad_enabled():
            self._backward.is_countable = False
            return None
        self._backward.expected += 1
        return self._backward

    def leave_gradients(
        self, layer: SyncNorm, local: Tensor, count: Tensor, backward: Backward | None
    ) -> None:
        """Keep a backward pass's [sum g, sum g xhat] and count for the next message."""
        is_late = backward is not None and backward is not self._backward
        kept = self._late if is_late else self._gradients
        name, new = self._name(layer), torch.cat([local.flatten(), count.view(1)])
        kept[name] = kept[name] + new if name in kept else new

    def note_arrival(self, backward: Backward | None, number: int) -> None:
        """A call made in that step has been through its backward pass, perhaps not for the first
        time.
        """
        if backward is not None:
            backward.arrived.add(number)
            if backward is self._backward and backward.is_complete:
                self._launch_gradients()

    def _launch_gradients(self) -> None:
        device = device_of(next(iter(self.layers.values())))
        parts = {
            name: zeros(size, device) for name, size in zip(self.layers, self._sizes(), strict=True)
        }
        for kept in (self._late, self._gradients):
            for name, sums in kept.items():
                parts[name] += sums.to(device)
        # Settled before another leaves: it is of an earlier step.
        if self._sent_gradients is not None:
            self._apply_sent_gradients()
        message = torch.cat(list(parts.values()))
        pending = exchange.start_sum(message, self.group, "all gradients", self._title)
        self._sent_gradients = (
            pending,
            [mark(layer, ("lagged_gradient",)) for layer in self.layers.values()],
        )
        self._gradients, self._late = {}, {}
        self._backward = Backward()

    def _apply(self, sums: list[Tensor], momenta: list[float | None]) -> None:
        super()._apply(sums, momenta)
        self._waits = None
        for layer, each in zip(self.layers.values(), sums, strict=True):
            _follow_moments(layer, of_sums(each))

    def _averages(self, layer: SyncNorm) -> Averages:
        wide = (
            t.to(torch.float64, copy=True)
            for t in (layer.lagged_mean, layer.lagged_var, layer.lagged_gradient)
        )
        return Averages(self._is_waiting(layer), *wide)

    def _is_waiting(self, layer: SyncNorm) -> bool:
        """Read once a step for all layers: the one look at values that this mode needs, on CUDA
        too.
        """
        if self._waits is None:
            flags = torch.stack([each.lagged_waits for each in self.layers.values()]).tolist()
            self._waits = dict(zip(self.layers, flags, strict=True))
        return self._waits[self._name(layer)]


def _follow_moments(layer: SyncNorm, batch: Moments) -> None:
    """Decide by the average that the last step used whether the next one waits, then let the
    average follow.

    Moments that are not finite (an overflow somewhere) enter nothing; the layer waits until there
    are others.
    """
    is_finite = batch.mean.isfinite().all() & batch.m2.isfinite().all()
    is_new, is_first = (batch.count > 0) & is_finite, layer.lagged_updates[0] == 0
    mean, var = layer.lagged_mean.double(), layer.lagged_var.double()
    has_drifted = (lagged.drift(batch, mean, var, layer.eps) > layer.lagged.max_drift) & ~is_first
    layer.lagged_waits.copy_(torch.where(is_new, has_drifted, layer.lagged_waits | ~is_finite))
    rate = _rate(layer, 0, layer.lagged.forward_rate)
    layer.lagged_mean.copy_(torch.where(is_new, mean + rate * (batch.mean - mean), mean))
    layer.lagged_var.copy_(torch.where(is_new, var + rate * (batch.var - var), var))
    layer.lagged_updates[0] += is_new


def _follow_gradients(layer: SyncNorm, sums: Tensor, count: Tensor) -> None:
    """Move the average gradient means towards the pooled ones; what is not finite (an overflow)
    enters nothing.
    """
    is_new = (count > 0) & sums.isfinite().all()
    rate = _rate(layer, 1, layer.lagged.backward_rate)
    gradient = layer.lagged_gradient.double()
    moved = gradient + rate * (sums * reciprocal(count) - gradient)
    layer.lagged_gradient.copy_(torch.where(is_new, moved, gradient))
    layer.lagged_updates[1] += is_new


def _rate(layer: SyncNorm, which: int, rate: float) -> Tensor:
    """The first value is taken whole: there is nothing to average it with."""
    updates = layer.lagged_updates[which]
    return torch.where(updates == 0, 1.0, torch.full_like(updates, rate, dtype=torch.float64))
