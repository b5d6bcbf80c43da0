"""`sync="lagged"`: pooled statistics in both passes, and nobody waits for them.

A layer normalises by an average of the pooled moments up to the last step, and corrects its gradient by an average
of the pooled gradient means up to the last step. Two flat asynchronous messages a step keep these up to date for
all layers. A layer that drifts (see `syncnorm.maths.lagged`) waits for pooling in the next step, as in the first.

The message of the backward pass leaves as soon as every layer's backward pass has been seen; where that cannot be
known (a forward without gradients, a branch without a loss), when the next training forward begins. The order of
messages is the same on all workers either way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from syncnorm import ops
from syncnorm.comm import exchange
from syncnorm.layers import SyncNorm
from syncnorm.maths import lagged
from syncnorm.maths.moments import Moments, of_sums, reciprocal
from syncnorm.model.running import PooledRunning
from syncnorm.ops import PooledMeans, Statistic


class LaggedMeans:
    """The gradient means of one call of a layer: averages of earlier steps, or pooled now if the layer waits."""

    def __init__(
        self, owner: PooledLagged, layer: SyncNorm, estimate: Tensor, pooled: PooledMeans | None, count: Tensor
    ) -> None:
        self.owner = owner
        self.layer = layer
        self.estimate = estimate
        self.pooled = pooled
        self.count = count
        self.step = owner.step if torch.is_grad_enabled() and not ops.is_recomputing() else None

    def __call__(self, local: Tensor) -> Tensor:
        self.owner.leave_gradients(self.layer, local, self.count)
        means = self.estimate if self.pooled is None else self.pooled(local)
        self.owner.note_arrival(self.step)
        return means


class PooledLagged(PooledRunning):
    """The layers of one model that share two messages a step; their `statistics`.

    The layers hold the averages in buffers, so that a resumed run is exact: `lagged_mean`, `lagged_var` (C,),
    `lagged_gradient` (2, C), `lagged_waits` (), and how many values entered the averages, `lagged_updates` (2,).
    """

    def __init__(self, layers: dict[str, SyncNorm]) -> None:
        super().__init__(layers)
        self._gradients = self._no_sums()
        self._pending_gradients: exchange.Pending | None = None
        self.step = 0
        """Number of backward messages so far."""
        self._is_backward_due = False
        self._expected = self._arrived = 0
        self._is_countable = True
        self._waits: dict[str, bool] | None = None

    def take(self, layer: SyncNorm, x: Tensor, mask: Tensor | None) -> Statistic:
        local = self._leave_sums(layer, x, mask)
        if not ops.is_recomputing():
            self._expected += torch.is_grad_enabled()
            self._is_countable &= torch.is_grad_enabled()
        group, count = self.group, local[-1].clone()
        # Copies, here and below: somebody may settle before the backward pass, and the averages move on.
        estimate = layer.lagged_gradient.to(torch.float64, copy=True)
        if self._is_waiting(layer):
            batch = of_sums(exchange.sum_(local, group, "moments"))
            means = LaggedMeans(self, layer, estimate, PooledMeans(batch.count, group), count)
        else:
            # An average has no count of its own; any above 1 says that its variance is one.
            several = torch.full_like(count, 2.0)
            mean, var = (t.to(torch.float64, copy=True) for t in (layer.lagged_mean, layer.lagged_var))
            batch = Moments(several, mean, var * several)
            means = LaggedMeans(self, layer, estimate, None, count)
        return Statistic(batch, means, is_pooled=group is not None)

    def settle(self) -> None:
        """Wait for what is under way and apply it. Starts no exchange."""
        super().settle()
        if self._pending_gradients is not None:
            message, self._pending_gradients = self._pending_gradients.wait(), None
            with torch.no_grad():
                self._apply_gradients(message)

    def launch(self) -> None:
        super().launch()
        self._is_backward_due = True
        self._launch_gradients_if_complete()

    def leave_gradients(self, layer: SyncNorm, local: Tensor, count: Tensor) -> None:
        """Keep a backward pass's [sum g, sum g xhat] and count for the next message."""
        name = self._name(layer)
        self._gradients[name] = self._gradients[name].to(local.device) + torch.cat([local.flatten(), count.view(1)])

    def note_arrival(self, step: int | None) -> None:
        """The backward pass of a call made in `step` has been through (None: a call that was not counted)."""
        if step == self.step:
            self._arrived += 1
            self._launch_gradients_if_complete()

    def _begin(self, model: nn.Module, args: object) -> None:
        if self._is_backward_due and not ops.is_recomputing() and self._trains():
            self._launch_gradients()
        super()._begin(model, args)

    def _launch_gradients_if_complete(self) -> None:
        if self._is_backward_due and self._is_countable and self._expected and self._arrived == self._expected:
            self._launch_gradients()

    def _launch_gradients(self) -> None:
        first = next(iter(self.layers.values()))
        message = torch.cat([sums.to(first.lagged_mean.device) for sums in self._gradients.values()])
        self._pending_gradients = exchange.start_sum(message, self.group, "all gradients")
        self._gradients = self._no_sums()
        self.step += 1
        self._is_backward_due = False
        self._expected = self._arrived = 0
        self._is_countable = True

    def _apply(self, batches: list[Moments]) -> None:
        super()._apply(batches)
        self._waits = None
        for layer, batch in zip(self.layers.values(), batches, strict=True):
            _follow_moments(layer, batch)

    def _apply_gradients(self, message: Tensor) -> None:
        parts = message.split([2 * layer.num_features + 1 for layer in self.layers.values()])
        for layer, part in zip(self.layers.values(), parts, strict=True):
            _follow_gradients(layer, part[:-1].view(2, -1), part[-1])

    def _is_waiting(self, layer: SyncNorm) -> bool:
        """Read once a step for all layers: the one look at values that this mode needs, on CUDA too."""
        if self._waits is None:
            flags = torch.stack([layer.lagged_waits for layer in self.layers.values()]).tolist()
            self._waits = dict(zip(self.layers, flags, strict=True))
        return self._waits[self._name(layer)]


def _follow_moments(layer: SyncNorm, batch: Moments) -> None:
    """Decide by the average that the last step used whether the next one waits, then let the average follow."""
    is_new, is_first = batch.count > 0, layer.lagged_updates[0] == 0
    mean, var = layer.lagged_mean.double(), layer.lagged_var.double()
    has_drifted = lagged.drift(batch, mean, var, layer.eps) > layer.lagged.max_drift
    layer.lagged_waits.copy_(torch.where(is_new, has_drifted & ~is_first, layer.lagged_waits))
    rate = _rate(layer, 0, layer.lagged.forward_rate)
    layer.lagged_mean.copy_(torch.where(is_new, mean + rate * (batch.mean - mean), mean))
    layer.lagged_var.copy_(torch.where(is_new, var + rate * (batch.var - var), var))
    layer.lagged_updates[0] += is_new


def _follow_gradients(layer: SyncNorm, sums: Tensor, count: Tensor) -> None:
    """Move the average gradient means towards the pooled ones."""
    is_new = count > 0
    rate = _rate(layer, 1, layer.lagged.backward_rate)
    gradient = layer.lagged_gradient.double()
    moved = gradient + rate * (sums * reciprocal(count) - gradient)
    layer.lagged_gradient.copy_(torch.where(is_new, moved, gradient))
    layer.lagged_updates[1] += is_new


def _rate(layer: SyncNorm, which: int, rate: float) -> Tensor:
    """The first value is taken whole: there is nothing to average it with."""
    updates = layer.lagged_updates[which]
    return torch.where(updates == 0, 1.0, torch.full_like(updates, rate, dtype=torch.float64))
