"""The moments of all layers of a model, pooled in one message a step.

The running statistics follow them, with `sync="running"` and where a step has several statistics;
under "lagged" the averages that normalise do, too, and there is another message for the backward
pass.

During a training forward the layers leave the raw sums of their batches here. When it ends, the
sums of all layers go out in one flat asynchronous message, which travels while the backward pass
runs. It is waited for and applied at one point: before the next training forward begins, or earlier
if somebody needs the running statistics (evaluation, `state_dict`, a copy, whoever reads or writes
a buffer). Applying never starts an exchange, so one worker may evaluate or save alone.

Hence nobody who reaches for a buffer through its layer sees that the update is made late. A buffer
that somebody holds since before the forward lacks it; if it is written before the update is
applied, what was written stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from syncnorm import tracing
from syncnorm.comm import debug, exchange, groups
from syncnorm.device import is_host, layer_device
from syncnorm.errors import FaultError, InputError
from syncnorm.maths.moments import Moments, Raw
from syncnorm.ops import LocalSums
from syncnorm.shards import LateShard, Shard
from syncnorm.statistics.buffers import CurrentBuffers, written
from syncnorm.statistics.flat import FlatMessage, zeros
from syncnorm.statistics.source import Source, Unattached, uncompiled_forward
from syncnorm.statistics.steps import Steps
from syncnorm.undocumented import disable_dynamo

if TYPE_CHECKING:
    from syncnorm.module import SyncNorm

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass
class Collected:
    """Sums and faults of the layers since a step began, by name."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    faults: dict[str, Tensor] = field(default_factory=dict)
    """True if a mask held something that is no weight."""
    tracked: set[str] | None = None
    """Names of the layers that track statistics, as of the step's first call; None until then.

    Layers that only other workers call are among them.
    """
    shard: LateShard | None = None
    """Shard of the first layer that was called."""


class Sent(NamedTuple):
    """A message on its way, with what it takes to apply it: that may have changed by then."""

    message: FlatMessage
    updates: list[tuple[bool, float | None]]
    """Whether each layer's running statistics follow, and its momentum."""
    members: list[int]
    shard: LateShard | None


class MomentsPool:
    """The layers of one model whose moments are pooled together; made by their source.

    Its steps are delimited by `syncnorm.statistics.steps`.

    Args:
        source: the source that the layers are given.
        layers: by name, in the same order on all workers, over the same process group.
        buffers: written by `follow` besides the running statistics.
        follow: told each layer's moments over all workers after its running statistics have
            followed them.
    """

    names: dict[SyncNorm, str]

    def __init__(
        self,
        source: Source,
        layers: dict[str, SyncNorm],
        buffers: tuple[str, ...] = (),
        follow: Callable[[SyncNorm, Moments], None] | None = None,
    ) -> None:
        self.layers = layers
        self.source = source
        self.names = {layer: name for name, layer in layers.items()}
        self._buffers = (*_BUFFERS, *buffers)
        self._follow = follow
        self._collected = self._kept = Collected()
        self._sent: Sent | None = None
        self._fault: str | None = None
        self.failure: exchange.Failure | None = None
        """The failed exchange; raised when all are there."""
        for layer in layers.values():
            layer.statistics = source
            CurrentBuffers.put_into(layer, source)

    @property
    def group(self) -> groups.Group | None:
        """Looked up anew, so that a copy or a pickle holds no process group."""
        return groups.statistics_group(next(iter(self.layers.values())).workers)

    def trains(self) -> bool:
        """True if a forward of the model trains some layer that has the source.

        The layers are asked, not the model: a wrapper's own flag says nothing. A layer that has
        been lent another source does not count, nor does a frozen one, nor one without numbers.
        """
        layers = self.layers.values()
        return any(
            each.training and each.statistics is self.source and not each.has_frozen_statistics
            for each in layers
        ) and not tracing.is_fake(next(iter(layers)))

    def collect(self, layer: SyncNorm, local: LocalSums) -> None:
        """Keep the sums of a call for the step's message."""
        if local.tracer is not None:
            return
        name, kept = self.names[layer], self._collected
        if kept.tracked is None:
            kept.tracked = self._tracked()
        if name not in kept.sums:
            kept.sums[name] = local.sums
        else:  # a layer that is used twice makes one merged update
            kept.sums[name] = kept.sums[name] + local.sums
            if kept.shard is not None and kept.shard.name == name:
                kept.shard.add(local.sums[-1])
        if local.has_fault is not None:
            kept.faults[name] = kept.faults.get(name, local.has_fault) | local.has_fault

    def check_outside(self, layer: SyncNorm, local: LocalSums) -> None:
        """Raise InputError, before any exchange, for a call that `collect` has no open step for."""
        if not local.is_repeated and not layer.has_frozen_statistics:
            raise InputError(
                f"`sync={layer.sync!r}` must be used through the model that was given to "
                f"prepare_ddp, got a direct call of layer {layer.label!r}. Call the model itself, and "
                "put its layers into training mode before the call, not within its forward; or "
                "prepare the part that is called. A part that models share is prepared by itself: "
                "a layer has the model that was prepared last."
            )

    def shard(self, layer: SyncNorm, local: LocalSums) -> LateShard | None:
        """The check for uneven shards, at one layer of a step; None at the others."""
        is_first = self._collected.shard is None and not (local.is_repeated or local.is_compiled)
        if not is_first or Shard.has_warned or not is_host(local.sums):
            return None
        self._collected.shard = LateShard(local.sums[-1], self.names[layer])
        return self._collected.shard

    def begin(self) -> None:
        """Start a step; drop what an unfinished one has left. Every worker must call.

        Raises:
            FaultError: some worker's data was at fault, known to all since its message arrived.
            ExchangeError: some worker sent something else than the others, likewise; or the
                exchange of the last step broke.
        """
        self.settle()
        self.drop()
        if self.failure is not None and self.group is not None:
            failure, self.failure = self.failure, None
            exchange.raise_failure(failure, self.group)
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise FaultError(fault)

    def drop(self) -> None:
        """Forget what a step has collected and not sent."""
        self._collected = Collected()

    def keep(self) -> None:
        """Remember what a step has collected so far."""
        now = self._collected
        self._kept = replace(now, sums=dict(now.sums), faults=dict(now.faults))

    def undo(self) -> None:
        """Forget what a step has collected since `keep`."""
        self._collected, self._kept = self._kept, Collected()

    def send(self) -> None:
        """Send what was collected, for all layers, on its way. Every worker must call."""
        self.settle()
        collected, self._collected = self._collected, Collected()
        group = self.group
        tracked = self._tracked() if collected.tracked is None else collected.tracked
        updates = [(name in tracked, layer.momentum) for name, layer in self.layers.items()]
        members = groups.ranks(group)
        faults = self._faults(collected, members)
        parts = {name: [sums] for name, sums in collected.sums.items()}
        message = FlatMessage(self.layers, parts, faults, group, "all moments", self._buffers)
        self._sent = Sent(message, updates, members, collected.shard)

    def _tracked(self) -> set[str]:
        return {name for name, layer in self.layers.items() if layer.is_tracking}

    def settle(self) -> None:
        """Wait for what is under way and apply it. Starts no exchange, and raises nothing."""
        if self._sent is not None:
            self._apply()

    @disable_dynamo
    def _apply(self) -> None:
        assert self._sent is not None
        (message, updates, members, shard), self._sent = self._sent, None
        with torch.no_grad():
            arrived = message.settle()
            if arrived is None:
                self.failure = message.failure
                return
            parts, faults = arrived
            kept = [(buffer, buffer.clone()) for buffer in written(message.marks)]
            # Elsewhere nobody looks: counts of NaN keep all statistics still.
            if is_host(faults) or debug.is_on:
                self._fault = self._describe(faults, members)
                if self._fault is not None:
                    return
            each = zip(message.layers, parts, updates, strict=True)
            for layer, sums, (is_tracking, momentum) in each:
                batch = Raw(sums)
                if is_tracking:
                    layer.update_running(batch, momentum)
                if self._follow is not None:
                    self._follow(layer, batch)
            for buffer, value in kept:
                buffer.copy_(value)
            if shard is not None and shard.is_due and not Shard.has_warned:
                counts = dict(zip(self.layers, parts, strict=True))
                shard.compare(counts[shard.name][-1].item(), members, shard.name)

    def discard(self, layer: SyncNorm) -> None:
        """Drop what is collected for a layer whose state is about to be replaced.

        The others get what is under way. A fault stays: this worker may be alone in replacing its
        state, and all are to raise.
        """
        self.settle()
        self._collected.sums.pop(self.names[layer], None)

    def release(self, layer: SyncNorm) -> None:
        """Let a layer go, up to date. On every worker alike."""
        self.discard(layer)
        layer.statistics = Unattached()
        del self.layers[self.names.pop(layer)]
        layer.__dict__["_buffers"] = dict(layer._buffers)

    def _faults(self, collected: Collected, members: list[int]) -> Tensor:
        """One number for each worker: at which layer its data was at fault, 0 for none.

        Layers count from 1; below 0 it is the input (debug mode), above 0 the mask.
        """
        device = layer_device(next(iter(self.layers.values())))
        faults = zeros(len(members), device)
        if not (collected.faults or debug.is_on):
            return faults
        mine = faults[members.index(groups.rank())]
        numbers = {name: number for number, name in enumerate(self.layers, start=1)}
        for name, sums in collected.sums.items():  # in the order of the calls: the first is named
            number = numbers[name]
            if name in collected.faults:
                is_faulty = collected.faults[name].to(device)
                mine.copy_(torch.where((mine == 0) & is_faulty, float(number), mine))
            if debug.is_on:
                is_finite = sums.to(device).isfinite().all()
                mine.copy_(torch.where((mine == 0) & ~is_finite, -number, mine))
        return faults

    def _describe(self, faults: Tensor, members: list[int]) -> str | None:
        """The error of the last forward, if any."""
        if not faults.any():
            return None
        names = [layer.label for layer in self.layers.values()]
        found = zip(members, faults.tolist(), strict=True)
        where = [f"rank {rank} in layer {names[int(abs(n)) - 1]!r}" for rank, n in found if n]
        if (faults > 0).any():
            what = "`mask` must hold finite weights >= 0, got others on"
            remedy = "They counted as 0. Give weight 0 to elements that should not count."
        else:
            what = "`x` must be finite (debug mode), got NaN or infinity on"
            remedy = (
                "Look at what comes before that layer, on those ranks. What is pooled at once "
                "reaches all ranks: then the first of these layers counts."
            )
        return (
            f"{what} {', '.join(where)}, in the last training forward. {remedy} No running "
            "statistics were updated."
        )

    def __getstate__(self) -> dict[str, Any]:
        # Nothing is under way in a copy.
        self.settle()
        return {**self.__dict__, "failure": None}


class PooledSource(Source):
    """A source of layers that act together, at the steps that the forwards of their model delimit."""

    pool: MomentsPool
    _steps: Steps
    forward = uncompiled_forward

    @property
    def steps(self) -> Steps:
        return self._steps

    @property
    def failure(self) -> exchange.Failure | None:
        return self.pool.failure

    def record(self, layer: SyncNorm, local: LocalSums, moments: Moments) -> None:
        self.pool.collect(layer, local)

    def settle(self) -> None:
        self.pool.settle()

    def discard(self, layer: SyncNorm) -> None:
        self.pool.discard(layer)

    def release(self, layer: SyncNorm) -> None:
        self.pool.release(layer)
