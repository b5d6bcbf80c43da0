"""`sync="running"`: local batch statistics, and running statistics pooled off the critical path.

During a training forward the layers leave the raw sums of their batches here. When the model's forward ends, the
sums of all layers go out in one flat asynchronous message, which travels while the backward pass runs. It is
waited for and applied at one point: before the next training forward begins, or earlier if somebody needs the
running statistics (evaluation, `state_dict`, a copy). Applying never starts an exchange, so one worker may
evaluate or save alone.

Hence between two training forwards the buffers lack exactly the last forward's update; no forward sees that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from syncnorm import ops
from syncnorm.comm import exchange, groups
from syncnorm.errors import FaultError, InputError
from syncnorm.layers import SyncNorm
from syncnorm.maths import kernels
from syncnorm.maths.moments import Moments, of_sums
from syncnorm.ops import PooledMeans, Statistic


class PooledRunning:
    """The layers of one model that pool their running statistics together; their `statistics`.

    Args:
        layers: the layers by name, in the same order on all workers, over the same process group.
    """

    def __init__(self, layers: dict[str, SyncNorm]) -> None:
        self.layers = layers
        self.is_held = False
        """Whether forwards are being accumulated into one update."""
        self._is_open = False
        self._sums = self._no_sums()
        self._fault: Tensor = torch.zeros((), dtype=torch.bool)
        self._pending: exchange.Pending | None = None
        for layer in layers.values():
            layer.statistics = self

    @property
    def group(self) -> groups.Group | None:
        """Looked up anew, so that a copy or a pickle holds no process group."""
        return groups.statistics_group(next(iter(self.layers.values())).process_group)

    def attach(self, model: nn.Module) -> None:
        """Have the forward of `model` delimit the steps."""
        model.register_forward_pre_hook(self._begin, prepend=True)
        model.register_forward_hook(self._end)

    def take(self, layer: SyncNorm, x: Tensor, mask: Tensor | None) -> Statistic:
        batch = of_sums(self._leave_sums(layer, x, mask))
        return Statistic(batch, PooledMeans(batch.count, None), is_pooled=False)

    def record(self, layer: SyncNorm, statistic: Statistic) -> None:
        """Nothing to do: the sums were left in `take`, and are applied in `settle`."""

    def settle(self) -> None:
        """Wait for what is under way and apply it. Starts no exchange."""
        if self._pending is None:
            return
        message, self._pending = self._pending.wait(), None
        with torch.no_grad():
            self._apply(self._read(message))

    def launch(self) -> None:
        """Send the sums that were left here, of all layers, on their way. Every worker must call."""
        self.settle()
        self._pending = exchange.start_sum(self._message(), self.group, "all moments")
        self._sums = self._no_sums()

    def _apply(self, batches: list[Moments]) -> None:
        for layer, batch in zip(self.layers.values(), batches, strict=True):
            layer.update_running(batch)

    def _begin(self, model: nn.Module, args: object) -> None:
        if ops.is_recomputing() or not self._trains():
            return
        self.settle()
        if not self.is_held:
            # Left by a forward that raised.
            self._sums = self._no_sums()
        self._is_open = True

    def _end(self, model: nn.Module, args: object, output: object) -> None:
        if self._is_open and not ops.is_recomputing():
            self._is_open = False
            if not self.is_held:
                self.launch()

    def _trains(self) -> bool:
        """The layers are asked, not the model: a wrapper's own flag says nothing.

        A layer that somebody else has lent another source does not act for us.
        """
        return any(layer.training and layer.statistics is self for layer in self.layers.values())

    def _leave_sums(self, layer: SyncNorm, x: Tensor, mask: Tensor | None) -> Tensor:
        """This batch's local sums, which are added to the layer's; a layer used twice gets one merged update."""
        is_again = ops.is_recomputing()
        if not (self._is_open or is_again):
            raise InputError(
                f"`sync={layer.sync!r}` must be used through the model that was given to prepare_ddp, got a direct "
                f"call of layer {self._name(layer)!r}. Call the model itself, or prepare the part that is called."
            )
        with torch.no_grad():
            if mask is not None:
                valid = ops.is_valid(mask)
                # Raised by all workers when the message has arrived; until then such weights count as 0.
                self._fault = self._fault.to(mask.device) | ~valid.all()
                mask = torch.where(valid, mask, 0.0)
            sums = kernels.local_moments(x.detach(), mask)
            if not is_again:
                name = self._name(layer)
                self._sums[name] = self._sums[name].to(sums.device) + sums
            return sums

    def _name(self, layer: SyncNorm) -> str:
        return next(name for name, each in self.layers.items() if each is layer)

    def _no_sums(self) -> dict[str, Tensor]:
        return {
            name: torch.zeros(2 * layer.num_features + 1, dtype=torch.float64) for name, layer in self.layers.items()
        }

    def _message(self) -> Tensor:
        """All sums, and one number per worker that says whether its data was at fault."""
        device = _device(next(iter(self.layers.values())))
        members = groups.ranks(self.group)
        faults = torch.zeros(len(members), dtype=torch.float64, device=device)
        faults[members.index(groups.rank(self.group))] = self._fault.to(device, torch.float64)
        self._fault = torch.zeros((), dtype=torch.bool)
        return torch.cat([*(sums.to(device) for sums in self._sums.values()), faults])

    def _read(self, message: Tensor) -> list[Moments]:
        sizes = [2 * layer.num_features + 1 for layer in self.layers.values()]
        *sums, faults = message.split([*sizes, message.numel() - sum(sizes)])
        if message.device.type == "cpu" and faults.any():
            ranks = [rank for rank, fault in zip(groups.ranks(self.group), faults.tolist(), strict=True) if fault]
            raise FaultError(
                f"`mask` must hold finite weights >= 0, got others in the last training forward on rank(s) {ranks}. "
                "They counted as 0; the running statistics were not updated. Give weight 0 to elements that "
                "should not count."
            )
        return [of_sums(s) for s in sums]


def _device(layer: SyncNorm) -> torch.device:
    """Where the layer's sums are."""
    state: Sequence[Tensor] = [*layer.buffers(recurse=False), *layer.parameters(recurse=False)]
    return state[0].device if state else torch.device("cpu")
