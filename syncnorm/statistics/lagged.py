"""`sync="lagged"`: pooled statistics in both passes, and nobody waits for them.

A layer normalises by an average of the pooled moments up to the last step, and corrects its
gradient by an average of the pooled gradient means up to the last step. Two flat asynchronous
messages a step keep these up to date for all layers. A layer that drifts (see
`syncnorm.maths.lagged`) waits for pooling in the next step, as in the first two.

As with `sync="batch"`, every worker must take the backward pass of the same calls. The message of
the backward pass leaves when each call of the step has been through it; where that cannot be
counted (forwards without gradients), when the next training forward begins. Both are points of the
program, the same on all workers, which may differ in what they checkpoint (but for a re-entrant
checkpoint that has outputs without a part in the loss: torch gives these gradients of zero).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from syncnorm.comm import exchange, groups
from syncnorm.errors import InputError
from syncnorm.maths import kernels, lagged
from syncnorm.maths.lagged import Lagged
from syncnorm.maths.moments import Moments, Packed, Raw
from syncnorm.ops import LocalSums, PooledMeans, Statistic
from syncnorm.recomputing import has_gradient_later
from syncnorm.statistics.buffers import written
from syncnorm.statistics.flat import FlatMessage
from syncnorm.statistics.pool import MomentsPool, PooledSource
from syncnorm.statistics.source import Mode, Source, Unattached
from syncnorm.statistics.steps import Steps
from syncnorm.undocumented import disable_dynamo

if TYPE_CHECKING:
    from syncnorm.module import SyncNorm


class LaggedMode(Mode):
    """The mode; its options are those of `Lagged`."""

    options: Lagged

    name: ClassVar[str] = "lagged"
    normalizes_by_batch: ClassVar[bool] = False

    def __init__(self, options: Lagged | None = None) -> None:
        self.options = options or Lagged()

    @property
    def argument(self) -> Lagged:
        return self.options

    def new_source(self) -> Source:
        return Unattached()

    def attach(self, layers: dict[str, SyncNorm], model: nn.Module) -> None:
        LaggedSource(layers).steps.attach(model)

    def buffers(self, num_features: int, device: torch.device | str | None) -> dict[str, Tensor]:
        wide: dict[str, Any] = {"dtype": torch.float64, "device": device}
        return {
            "lagged_mean": torch.zeros(num_features, **wide),
            "lagged_var": torch.ones(num_features, **wide),
            "lagged_gradient": torch.zeros(2, num_features, **wide),
            # How many values entered the averages: of moments, of gradient means.
            "lagged_updates": torch.zeros(2, dtype=torch.int64, device=device),
            # 1 or 0: torch's averages of models (`AveragedModel`) cannot take a bool.
            "lagged_waits": torch.ones((), dtype=torch.int64, device=device),
        }

    def flat_sizes(self, channels: Sequence[int], workers: int) -> list[int]:
        numbers = sum(2 * each + 1 for each in channels)
        return [numbers + workers, numbers]


class _Own(NamedTuple):
    """The layer's own buffers, see `LaggedMode.buffers`, and options."""

    mean: Tensor
    var: Tensor
    gradient: Tensor
    updates: Tensor
    waits: Tensor
    options: Lagged

    @classmethod
    def of(cls, layer: SyncNorm) -> _Own:
        """Past `CurrentBuffers`: for callers that have settled, or are about to."""
        assert isinstance(layer.sync_mode, LaggedMode)
        buffers: Any = map(partial(dict.__getitem__, layer._buffers), _NAMES)
        return cls(*buffers, options=layer.sync_mode.options)


class _Averages(NamedTuple):
    """What layers have averaged up to the last step, by their names."""

    waits: dict[str, bool]
    """True for a layer that waits for pooling in this step."""
    copies: dict[str, Tensor]
    """See `lagged.snapshots`: the averages move on before the backward pass if somebody settles."""


_NAMES = [f"lagged_{name}" for name in _Own._fields if name != "options"]


def _add(kept: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    """The sums of two calls of a layer, which may have moved between them."""
    return [a.to(b.device) + b for a, b in zip(kept, new, strict=True)]


@dataclass
class Backward:
    """The backward pass of a step: which of its calls have been through."""

    expected: int = 0
    arrived: set[int] = field(default_factory=set)
    is_countable: bool = True
    is_due: bool = False
    """True if the forward's message has left."""

    @property
    def is_complete(self) -> bool:
        return self.is_due and self.is_countable and 0 < self.expected == len(self.arrived)


class FixedMeans:
    """The averages of earlier steps as the gradient means of a call that leaves no trace.

    Args:
        layer: the layer.
        estimate: its average gradient means, shape (2, C).
    """

    def __init__(self, layer: SyncNorm, estimate: Tensor) -> None:
        self.layer: SyncNorm = layer
        self.estimate: Tensor = estimate

    @property
    def is_local(self) -> bool:
        return False

    def totals(self, local: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.estimate, None

    def double_backward_means(self, local: Tensor) -> Tensor:
        raise InputError(
            '`sync` must be "batch", "running" or "none" where a gradient is differentiated, got '
            f'"lagged" in layer {self.layer.label!r}. Its gradient is corrected by an average and '
            "is no derivative of its output."
        )

    def for_inner_gradient(self) -> Self:
        return self

    def for_repetition(self) -> FixedMeans:
        return FixedMeans(self.layer, self.estimate)


class LaggedMeans(FixedMeans):
    """The gradient means of one call: averages of earlier steps, or pooled now if the layer waits.

    Args:
        source: the layers' source.
        layer: the layer.
        estimate: its average gradient means, shape (2, C).
        pooled: what pools them now; None: nothing, the average is used.
        count: values per channel on this worker, shape (1,).
        backward: the backward pass that the call belongs to, and is counted in; None: none.
    """

    number: int

    def __init__(
        self,
        source: LaggedSource,
        layer: SyncNorm,
        estimate: Tensor,
        pooled: PooledMeans | None,
        count: Tensor,
        backward: Backward | None,
    ) -> None:
        # Not by the base class: a call less in every forward.
        self.layer: SyncNorm = layer
        self.estimate: Tensor = estimate
        self.source = source
        self.pooled = pooled
        self.count = count
        self.backward = backward
        # Not id(self): a later call of the same step may be given the memory, and the id, of this
        # one.
        self.number = 0 if backward is None else backward.expected

    def totals(self, local: Tensor) -> tuple[Tensor, Tensor | None]:
        totals = (self.estimate, None) if self.pooled is None else self.pooled.totals(local)
        self.source.add_gradients(self.layer, local, self.count, self.backward, self.number)
        return totals

    def for_repetition(self) -> LaggedMeans:
        # Counted as the same call: of a re-entrant checkpoint the repetition is what goes through
        # the backward pass.
        again = copy.copy(self)
        if self.pooled is not None:
            again.pooled = self.pooled.for_repetition()
        return again


class LaggedSource(PooledSource):
    """The layers of one model that share two messages a step.

    The layers hold the averages in buffers, so that a resumed run is exact.

    Args:
        layers: by name, in the same order on all workers, over the same process group.
    """

    pool: MomentsPool

    def __init__(self, layers: dict[str, SyncNorm]) -> None:
        buffers = ("lagged_mean", "lagged_var", "lagged_waits")
        self.pool = MomentsPool(self, layers, buffers, self._follow_moments)
        self._steps = Steps(self)
        self._backward = Backward()
        self._gradients: dict[str, list[Tensor]] = {}
        """[sum g, sum g xhat], flat, and the count, of each layer's calls so far."""
        self._late: dict[str, list[Tensor]] = {}
        """The same of steps whose message has left.

        There were two forwards before a backward pass, or two passes over one forward.
        """
        self._sent: FlatMessage | None = None
        """The message of the backward pass, under way."""
        self._averages: _Averages | None = None
        """The averages of the present step, while nobody moves them."""

    @property
    def layers(self) -> Mapping[str, SyncNorm]:
        return self.pool.layers

    def statistic(self, layer: SyncNorm, local: LocalSums) -> Statistic:
        name = self.pool.names[layer]
        if self._steps.is_open:
            averages = self._averages = self._averages or self._read(self.layers)
        else:
            self.pool.check_outside(layer, local)
            self.settle()
            # Somebody may write them between any two calls.
            averages = self._read({name: layer})
        group, count, pooled = groups.statistics_group(layer.workers), local.sums[-1:], None
        kept, size = averages.copies[name], 2 * layer.num_features + 1
        moments, estimate = Packed(kept[:size]), kept[size:].view(2, -1)
        if averages.waits[name]:
            moments = Raw(exchange.sum_(local.sums, group, "moments", layer.label))
            pooled = PooledMeans(moments, group, layer.label)
        if layer.has_frozen_statistics:
            means = pooled or FixedMeans(layer, estimate)
        else:
            backward = None if local.is_repeated else self._expect()
            means = LaggedMeans(self, layer, estimate, pooled, count, backward)
        return Statistic(moments, means, is_pooled=group is not None)

    def trains(self) -> bool:
        """True if a forward that begins now trains any layer."""
        return self.pool.trains()

    def begin(self) -> None:
        """Start a step; drop what an unfinished one has left. Every worker must call."""
        if self._backward.is_due:
            self._send_gradients()
        self.settle()
        self.drop()
        self.pool.begin()
        # Somebody may have written them since.
        self._averages = None

    def send(self) -> None:
        """Send the moments, and the gradient means if they are complete. Every worker must call."""
        self.settle()
        self.pool.send()
        self._backward.is_due = True
        if self._backward.is_complete:
            self._send_gradients()

    def drop(self) -> None:
        """Forget what the step has collected and not sent."""
        self.pool.drop()
        # Of a step whose forward's message has left, the backward's follows in any case.
        if not self._backward.is_due:
            self._backward = Backward()
            self._gradients = {}

    def keep(self) -> None:
        """Remember what the step has collected so far."""
        self.pool.keep()

    def undo(self) -> None:
        """Forget what the step has collected since `keep`."""
        self.pool.undo()

    def settle(self) -> None:
        self.pool.settle()
        if self._sent is not None:
            self._apply_gradients()

    def discard(self, layer: SyncNorm) -> None:
        self.settle()
        self.pool.discard(layer)
        for kept in (self._gradients, self._late):
            kept.pop(self.pool.names[layer], None)
        self._averages = None

    def release(self, layer: SyncNorm) -> None:
        self.discard(layer)
        self.pool.release(layer)

    def __getstate__(self) -> dict[str, Any]:
        # Nothing is under way in a copy.
        self.settle()
        return {**self.__dict__, "_averages": None}

    def add_gradients(
        self, layer: SyncNorm, local: Tensor, count: Tensor, backward: Backward | None, number: int
    ) -> None:
        """Keep a call's [sum g, sum g xhat], shape (2, C), and count for the message, and note it.

        The call may have been through its backward pass before. What is left of a layer that belongs
        to another model by now goes nowhere.
        """
        if layer not in self.pool.names:
            return
        is_late = backward is not None and backward is not self._backward
        kept = self._late if is_late else self._gradients
        name, new = self.pool.names[layer], [local.flatten(), count]
        kept[name] = _add(kept[name], new) if name in kept else new
        if backward is not None:
            backward.arrived.add(number)
            if backward is self._backward and backward.is_complete:
                self._send_gradients()

    def _expect(self) -> Backward | None:
        """The backward pass that the present call belongs to; None if it has no gradient."""
        if not (torch.is_grad_enabled() or has_gradient_later()):
            self._backward.is_countable = False
            return None
        self._backward.expected += 1
        return self._backward

    def _send_gradients(self) -> None:
        parts = dict(self._late)
        for name, sums in self._gradients.items():
            parts[name] = _add(parts[name], sums) if name in parts else sums
        # Settled before another leaves: it is of an earlier step.
        if self._sent is not None:
            self._apply_gradients()
        self._sent = FlatMessage(
            self.layers, parts, None, self.pool.group, "all gradients", ["lagged_gradient"]
        )
        self._gradients, self._late = {}, {}
        self._backward = Backward()

    @disable_dynamo
    def _apply_gradients(self) -> None:
        assert self._sent is not None
        message, self._sent = self._sent, None
        with torch.no_grad():
            arrived = message.settle()
            if arrived is None:
                self.pool.failure = message.failure
                return
            self._averages = None
            others = {id(buffer) for buffer in written(message.marks)}
            for layer, sums in zip(message.layers, arrived.parts, strict=True):
                own = _Own.of(layer)
                if id(own.gradient) not in others:
                    rules = kernels.fused_for_lagged(*own[:5]) or lagged
                    rules.follow_gradients_(sums, own.gradient, own.updates[1], own.options)

    @torch.no_grad()
    def _read(self, layers: Mapping[str, SyncNorm]) -> _Averages:
        """Read the averages of layers: the one look at values that this mode needs, on CUDA too."""
        by_device: dict[torch.device, dict[str, _Own]] = {}
        for name, layer in layers.items():
            own = _Own.of(layer)
            by_device.setdefault(own.mean.device, {})[name] = own
        averages = _Averages({}, {})
        # A forward in inference mode may be the first of a step.
        with torch.inference_mode(False):
            for owns in by_device.values():
                copies = lagged.snapshots([(o.mean, o.var, o.gradient) for o in owns.values()])
                averages.copies.update(zip(owns, copies, strict=True))
                waits = torch.stack([o.waits for o in owns.values()]).tolist()
                averages.waits.update(zip(owns, map(bool, waits), strict=True))
        return averages

    def _follow_moments(self, layer: SyncNorm, batch: Moments) -> None:
        self._averages = None
        own = _Own.of(layer)
        # As few launches as the device allows.
        rules = kernels.fused_for_lagged(*own[:5]) or lagged
        rules.follow_moments_(
            batch, own.mean, own.var, own.updates[0], own.waits, layer.eps, own.options
        )
