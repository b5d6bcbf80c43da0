"""`sync="running"`: local batch statistics, and running statistics pooled off the critical path.

During a training forward the layers leave the raw sums of their batches here. When the model's
forward ends, the sums of all layers go out in one flat asynchronous message, which travels while
the backward pass runs. It is waited for and applied at one point: before the next training forward
begins, or earlier if somebody needs the running statistics (evaluation, `state_dict`, a copy,
whoever reads or writes a buffer). Applying never starts an exchange, so one worker may evaluate or
save alone.

Hence nobody who reaches for a buffer through its layer sees that the update is made late. A buffer
that somebody holds since before the forward lacks it; if it is written before the update is
applied, what was written stays.

What one step has gathered is one object. It is made when a forward begins, sent when it ends, and
dropped whole if the forward raises.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from syncnorm import observed, ops
from syncnorm.comm import debug, exchange, groups
from syncnorm.comm.inflight import InFlight
from syncnorm.compiled import untraced
from syncnorm.errors import FaultError, InputError
from syncnorm.maths.moments import of_sums
from syncnorm.module import Call, SyncNorm, Unattached
from syncnorm.ops import LateShard, LocalSums, PooledMeans, Shard, Statistic
from syncnorm.statistics.buffers import CurrentBuffers, Marks, mark, written


@dataclass
class Forward:
    """What the layers have left since a step began: sums by layer, and where data was at fault."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    bad_masks: dict[str, Tensor] = field(default_factory=dict)
    shard: LateShard | None = None
    """Of the first layer that was called."""

    def leave(self, name: str, local: LocalSums) -> None:
        """Add to the layer's; one that is used twice makes one merged update."""
        self.sums[name] = self.sums[name] + local.sums if name in self.sums else local.sums
        if local.has_fault is not None:
            self.bad_masks[name] = self.bad_masks.get(name, local.has_fault) | local.has_fault


_STATISTICS = (
    "running_mean",
    "running_var",
    "num_batches_tracked",
    "lagged_mean",
    "lagged_var",
    "lagged_waits",
)


class Sent(NamedTuple):
    """A message on its way, and what it takes to apply it: momenta, groups and buffers may have
    changed by then.
    """

    message: exchange.Pending
    momenta: list[float | None]
    members: list[int]
    marks: Marks
    shard: LateShard | None


class PooledRunning:
    """The layers of one model that pool their running statistics together; their `statistics`.

    Args:
        layers: the layers by name, in the same order on all workers, over the same process group.
    """

    def __init__(self, layers: dict[str, SyncNorm]) -> None:
        self.layers = layers
        self._names = {layer: name for name, layer in layers.items()}
        self.is_held = False
        """Whether forwards are being accumulated into one update."""
        self._forward = Forward()
        self._is_open = False
        self._handled: BaseException | None = None
        self._sent: Sent | None = None
        self._fault: str | None = None
        self._mixed: InFlight | None = None
        """An exchange in which some workers sent something else, to be raised when all are there
        again.
        """
        for layer in layers.values():
            layer.statistics = self
            CurrentBuffers.put_into(layer, self)

    @property
    def group(self) -> groups.Group | None:
        """Looked up anew, so that a copy or a pickle holds no process group."""
        return groups.statistics_group(next(iter(self.layers.values())).workers)

    def attach(self, model: nn.Module) -> None:
        """Have the forward of `model` delimit the steps."""
        model.register_forward_pre_hook(self._begin, prepend=True)
        model.register_forward_hook(self._end, always_call=True)

    def take(self, layer: SyncNorm, local: LocalSums, call: Call) -> Statistic:
        self._leave(layer, local, call)
        batch = of_sums(local.sums)
        return Statistic(
            batch, PooledMeans(batch, None, layer.label, self._shard(layer, local)), is_pooled=False
        )

    def _shard(self, layer: SyncNorm, local: LocalSums) -> LateShard | None:
        """What notices uneven shards, at one layer of a forward."""
        is_looked_at = (
            not Shard.has_warned and local.sums.device.type == "cpu" and not ops.is_recomputing()
        )
        if self._forward.shard is None and is_looked_at:
            self._forward.shard = LateShard(local.sums[-1], self._name(layer))
            return self._forward.shard
        return None

    def record(self, layer: SyncNorm, statistic: Statistic) -> None:
        """Nothing to do: the sums were left in `take`, and are applied in `settle`."""

    def parts(self, count: int) -> Sequence[int] | None:
        return None

    def settle(self) -> None:
        """Wait for what is under way and apply it.

        Starts no exchange, and raises nothing: one worker may be alone.
        """
        if self._sent is not None:
            self._apply_sent()

    @untraced
    def _apply_sent(self) -> None:
        assert self._sent is not None
        (pending, momenta, members, marks, shard), self._sent = self._sent, None
        with torch.no_grad():
            message = pending.wait()
            if pending.mixed is not None:
                self._mixed = pending.mixed
                return
            kept = [(buffer, buffer.clone()) for buffer in written(marks)]
            faults = message[-len(members) :]
            self._fault = self._describe(faults, members)
            if self._fault is None:
                # Where nobody looks, a count of NaN keeps the statistics still.
                message = torch.where(faults.any(), torch.nan, message)
                *sums, _ = message.split([*self._sizes(), len(members)])
                self._apply(
                    [
                        s.to(device_of(layer))
                        for layer, s in zip(self.layers.values(), sums, strict=True)
                    ],
                    momenta,
                )
                for buffer, value in kept:
                    buffer.copy_(value)
                self._compare(shard, message, members)

    def forget(self, layer: SyncNorm) -> None:
        """The layer's state is about to be replaced: let the others have what is under way, and
        drop the layer's.

        A fault stays: this worker may be alone in replacing its state, and all are to raise.
        """
        self.settle()
        self._forward.sums.pop(self._name(layer), None)

    def release(self, layer: SyncNorm) -> None:
        """Let a layer go, up to date: it is about to become another one. On every worker alike."""
        self.forget(layer)
        del self.layers[self._names.pop(layer)]
        layer.statistics = Unattached()
        layer.__dict__["_buffers"] = dict(layer._buffers)

    def drop(self) -> None:
        """Forget what a step has gathered and not sent."""
        self._forward = Forward()
        self._is_open = False

    def start(self) -> None:
        """Begin a step. Every worker must call.

        Raises:
            FaultError: some worker's data was at fault in the last one, known to all since its
                message arrived.
            ExchangeError: some worker sent something else than the others, likewise.
        """
        self.settle()
        self.drop()
        if self._mixed is not None and self.group is not None:
            mixed, self._mixed = self._mixed, None
            exchange.raise_mixed(mixed, self.group)
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise FaultError(fault)

    def launch(self) -> None:
        """Send what was left here, for all layers, on its way. Every worker must call."""
        self.settle()
        forward, self._forward = self._forward, Forward()
        group, momenta = self.group, [layer.momentum for layer in self.layers.values()]
        members = groups.ranks(group)
        message = exchange.start_sum(
            self._message(forward, members), group, "all moments", self._title
        )
        marks = [each for layer in self.layers.values() for each in mark(layer, _STATISTICS)]
        self._sent = Sent(message, momenta, members, marks, forward.shard)

    def _compare(self, shard: LateShard | None, message: Tensor, members: list[int]) -> None:
        """Warn if the backward pass was of a loss that was not scaled, and the shards were uneven."""
        if shard is not None and shard.is_due and not Shard.has_warned:
            counts = dict(
                zip(
                    self.layers,
                    (part[-1] for part in message.split([*self._sizes(), len(members)])),
                )
            )
            shard.compare(counts[shard.name].item(), members, shard.name)

    def _apply(self, sums: list[Tensor], momenta: list[float | None]) -> None:
        for layer, each, momentum in zip(self.layers.values(), sums, momenta, strict=True):
            layer.update_running(of_sums(each), momentum)

    def _begin(self, model: nn.Module, args: object) -> None:
        if self._trains() and not any(
            observed.is_fake(layer) for layer in [*self.layers.values()][:1]
        ):
            self._open()
        elif self._is_open and not ops.is_recomputing():
            self._is_open = False

    @untraced
    def _open(self) -> None:
        if ops.is_recomputing():
            return
        self._is_open = False
        if not self.is_held:
            self.start()
        self._is_open = True
        self._handled = sys.exc_info()[1]

    def _end(self, model: nn.Module, args: object, output: object) -> None:
        if self._is_open:
            self._close()

    @untraced
    def _close(self) -> None:
        if ops.is_recomputing():
            return
        self._is_open = False
        # Called for a forward that raised, too, while its exception is being handled.
        has_raised = sys.exc_info()[1] is not self._handled
        self._handled = None
        if not has_raised and not self.is_held:
            self.launch()

    def _trains(self) -> bool:
        """The layers are asked, not the model: a wrapper's own flag says nothing.

        A layer that somebody else has lent another source does not act for us, nor does a frozen
        one.
        """
        layers = self.layers.values()
        return any(
            each.training and each.statistics is self and each.freeze is None for each in layers
        )

    def _leave(self, layer: SyncNorm, local: LocalSums, call: Call) -> None:
        if ops.is_recomputing() or call.is_frozen:
            return
        if not self._is_open:
            raise InputError(
                f"`sync={layer.sync!r}` must be used through the model that was given to "
                "prepare_ddp, got a direct "
                f"call of layer {self._name(layer)!r}. Call the model itself, or prepare the part "
                "that is called."
            )
        self._forward.leave(self._name(layer), local)

    def _name(self, layer: SyncNorm) -> str:
        return self._names[layer]

    @property
    def _title(self) -> str:
        """What errors call all layers together."""
        names = list(self.layers)
        return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"

    def _sizes(self) -> list[int]:
        return [2 * layer.num_features + 1 for layer in self.layers.values()]

    def __getstate__(self) -> dict[str, object]:
        # Nothing is under way in a copy; and one made within `accumulate` is not part of it.
        self.settle()
        return {
            **self.__dict__,
            "is_held": False,
            "_is_open": False,
            "_handled": None,
            "_mixed": None,
        }

    def _message(self, forward: Forward, members: list[int]) -> Tensor:
        """All sums, then one number for each worker: at which layer its data was at fault, if at
        any.
        """
        device = device_of(next(iter(self.layers.values())))
        sums = [
            forward.sums[name].to(device) if name in forward.sums else zeros(size, device)
            for name, size in zip(self.layers, self._sizes(), strict=True)
        ]
        faults = zeros(len(members), device)
        numbers = {name: number for number, name in enumerate(self.layers, start=1)}
        for name in forward.sums:  # in the order of the calls: the first to be at fault is named
            number, mine = numbers[name], faults[members.index(groups.rank())]
            if name in forward.bad_masks:
                mine.copy_(
                    torch.where(
                        (mine == 0) & forward.bad_masks[name].to(device), float(number), mine
                    )
                )
            if debug.is_debug():
                mine.copy_(
                    torch.where(
                        (mine == 0) & ~forward.sums[name].to(device).isfinite().all(), -number, mine
                    )
                )
        return torch.cat([*sums, faults])

    def _describe(self, faults: Tensor, members: list[int]) -> str | None:
        """What was wrong in the last forward. On CUDA it is looked at in debug mode only."""
        if not (faults.device.type == "cpu" or debug.is_debug()) or not faults.any():
            return None
        names = list(self.layers)
        found = zip(members, faults.tolist(), strict=True)
        where = [f"rank {rank} in layer {names[int(abs(n)) - 1]!r}" for rank, n in found if n]
        if (faults > 0).any():
            what = "`mask` must hold finite weights >= 0, got others on"
            remedy = "They counted as 0. Give weight 0 to elements that should not count."
        else:
            what = "`x` must be finite (debug mode), got NaN or infinity on"
            remedy = "Look at what comes before that layer, on those ranks."
        return f"{what} {', '.join(where)}, in the last training forward. {remedy} No running statistics were updated."


def device_of(layer: SyncNorm) -> torch.device:
    """Where the layer's sums are. Waits for nothing."""
    tensors = (*dict.values(layer._buffers), *layer._parameters.values())
    return next((tensor.device for tensor in tensors if tensor is not None), torch.device("cpu"))


def zeros(size: int, device: torch.device) -> Tensor:
    return torch.zeros(size, dtype=torch.float64, device=device)
