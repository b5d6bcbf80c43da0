"""A mode, the meaning of a layer's `sync`, and a source, which acts for layers while they train.

A layer's training forward asks its source for the statistic that normalises a batch, and hands it
what the running statistics should follow:

    local = ops.local_sums(x, mask, weight, bias)
    statistic = source.statistic(layer, local)         # here workers exchange, or do not
    y, statistic = ops.normalize_batch(x, weight, bias, statistic, eps, local)
    source.record(layer, local, statistic.moments)     # here running statistics follow, or will

Whoever else touches a layer's statistics says so first:

    settle    they are about to be read: what is on its way is waited for    exchanges and raises nothing
    discard   they are about to be replaced: what is on its way is dropped   exchanges and raises nothing
    release   the layer is about to become another, or to be left out        every worker must call

A mode is a fact about a layer; it is one of `syncnorm.statistics.MODES` and alone knows its name,
its buffers and what it sends. A source is what a layer of that mode is given, and may be lent
another one for a while (within `accumulate` and `evaluation_statistics`, by `recalibrate`).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from syncnorm import ops, tracing
from syncnorm.comm import exchange, groups
from syncnorm.errors import InputError
from syncnorm.maths.moments import Moments
from syncnorm.ops import LocalSums, Statistic
from syncnorm.statistics.steps import Steps
from syncnorm.undocumented import (
    count_dispatch_modes,
    disable_dynamo,
    unseen_by_selective_checkpoint,
)

if TYPE_CHECKING:
    from syncnorm.module import SyncNorm


class Source(ABC):
    """Gives a layer its training statistics, and takes its batches' sums; abstract."""

    is_attached: ClassVar[bool] = True
    """False until `prepare_ddp` has introduced layers that act together to each other."""
    is_lent: ClassVar[bool] = False
    """True if a layer has this source for the length of a block."""

    @property
    def steps(self) -> Steps | None:
        """The steps of the model, where layers act together; None where each acts alone."""
        return None

    @property
    def is_accumulating(self) -> bool:
        """True if several forwards are to make one update now."""
        return self.steps is not None and self.steps.is_held

    @property
    def is_busy(self) -> bool:
        """True if a block is under way, at whose end the layer must be as it is."""
        return self.is_lent or self.is_accumulating

    @property
    def failure(self) -> exchange.Failure | None:
        """The failed exchange that the running statistics lack; the next training forward raises it."""
        return None

    @abstractmethod
    def statistic(self, layer: SyncNorm, local: LocalSums) -> Statistic:
        """The statistic that normalises this batch. Of a frozen layer's nothing is kept."""

    def traced_statistic(self, layer: SyncNorm, local: LocalSums) -> Statistic:
        """The same in front of a tracer, which would not see an exchange.

        Raises:
            InputError: the source cannot do without one; by default, but for fake tensors.
        """
        if local.tracer != tracing.FAKE:
            raise tracing.refuse(local.tracer or "", layer.label)
        return ops.local_statistic(local, layer.label)

    def record(self, layer: SyncNorm, local: LocalSums, moments: Moments) -> None:
        """Update the running statistics by this call, now or when the step ends.

        Called after each forward that is not frozen and no repetition.

        Args:
            layer: the layer.
            local: this worker's sums, for sources that pool them later.
            moments: those that the batch was normalised by.
        """
        if layer.is_tracking:
            layer.update_running(moments, layer.momentum)

    def forward(self, layer: SyncNorm, x: Tensor, mask: Tensor | None) -> Tensor:
        """The training forward, as a whole or in parts that have a statistic each."""
        return layer.train_forward(x, mask)

    def evaluate(self, layer: SyncNorm, x: Tensor, mask: Tensor | None) -> Tensor:
        """The evaluation forward. *Collectives*: none, but by a source that is lent for them."""
        self.settle()
        return layer.evaluate(x)

    def settle(self) -> None:  # noqa: B027 nothing to do for most
        """Bring the running statistics up to date, before they are read or written.

        Never starts an exchange and never raises: one worker may be alone.
        """

    def discard(self, layer: SyncNorm) -> None:  # noqa: B027 nothing to do for most
        """Drop what is under way for a layer whose running statistics are about to be replaced."""

    def release(self, layer: SyncNorm) -> None:  # noqa: B027 nothing to do for most
        """Detach a layer, up to date, that is about to become another. Every worker must call."""


class Lent(Source):
    """A layer's own source for the length of a block, which a subclass changes in part.

    A copy or a pickle that is made within the block has the layer's own: it is no part of the block.

    Args:
        source: the layer's own.
    """

    is_lent = True

    def __init__(self, source: Source) -> None:
        self.source = source

    @property
    def is_accumulating(self) -> bool:
        return self.source.is_accumulating

    @property
    def failure(self) -> exchange.Failure | None:
        return self.source.failure

    def settle(self) -> None:
        self.source.settle()

    def discard(self, layer: SyncNorm) -> None:
        self.source.discard(layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        return copy.deepcopy(self.source, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.source,)


def _itself(source: Source) -> Source:
    return source


@disable_dynamo
def uncompiled_forward(self: Source, layer: SyncNorm, x: Tensor, mask: Tensor | None) -> Tensor:
    """The `forward` of a source that compiled code calls rather than contains."""
    forward = layer.train_forward
    if count_dispatch_modes():  # which a compiled forward of the layer does not look at
        if torch.compiler.is_exporting():
            raise InputError(
                '`sync` must be "batch" or "none" where torch.export takes a training forward, got '
                f"{layer.sync!r} in layer {layer.label!r}. Export in evaluation mode, or convert with "
                'sync="batch".'
            )
        forward = unseen_by_selective_checkpoint(forward)
    return forward(x, mask)


class Unattached(Source):
    """The source of modes in which layers act together: an error until `prepare_ddp` has introduced them."""

    is_attached = False
    forward = uncompiled_forward

    def traced_statistic(self, layer: SyncNorm, local: LocalSums) -> Statistic:
        return ops.statistic_if_alone(local, layer.workers, layer.label)

    def statistic(self, layer: SyncNorm, local: LocalSums) -> Statistic:
        if groups.statistics_group(layer.workers) is None:
            return ops.local_statistic(local, layer.label)
        raise InputError(
            '`sync` must be "batch" or "none" in a layer that prepare_ddp has not been given, got '
            f"{layer.sync!r} in {layer}. Call prepare_ddp(model) on every worker before training "
            "(and before DistributedDataParallel)."
        )


class Mode(ABC):
    """The meaning of a layer's `sync`; abstract. An object holds the options that the user gave."""

    name: ClassVar[str]
    is_pooled: ClassVar[bool] = True
    """True if workers exchange statistics at all."""
    normalizes_pooled: ClassVar[bool] = True
    """True if a batch is normalised by statistics of all workers, not by its own."""
    normalizes_by_batch: ClassVar[bool] = True
    """True if it is normalised by moments of a batch, which have a count, not by an average."""

    @classmethod
    def pools_each_batch(cls) -> bool:
        """True if a batch is normalised by its own moments over all workers."""
        return cls.normalizes_pooled and cls.normalizes_by_batch

    @property
    def argument(self) -> Any:
        """The value of `sync` that gives a layer this mode, with these options."""
        return self.name

    @abstractmethod
    def new_source(self) -> Source:
        """The source of a layer that is alone."""

    def attach(self, layers: dict[str, SyncNorm], model: nn.Module) -> None:  # noqa: B027 nothing to do for most
        """Introduce layers to each other that are to act together, in the forwards of `model`.

        Args:
            layers: by name, over one process group, in the same order on all workers.
        """

    def buffers(self, num_features: int, device: torch.device | str | None) -> dict[str, Tensor]:
        """Initial values of the buffers that a layer has besides its running statistics.

        These buffers keep their type when the layer is cast.
        """
        return {}

    @property
    def buffer_names(self) -> list[str]:
        """The names of these buffers."""
        return [*self.buffers(1, "meta")]

    def own_sizes(self, channels: int) -> list[int]:
        """Numbers in each exchange that a call of a layer makes and waits for, both ways."""
        return []

    def flat_sizes(self, channels: Sequence[int], workers: int) -> list[int]:
        """Numbers in each exchange of all these layers together, in a training step."""
        return []

    def begin(self, layer: SyncNorm) -> None:
        """Give the layer's own buffers the values that they have in a new layer."""
        names = self.buffer_names
        if names:
            new = self.buffers(layer.num_features, layer.get_buffer(names[0]).device)
            with torch.no_grad():
                for name in names:
                    layer.get_buffer(name).copy_(new[name])

    def complete(
        self, layer: SyncNorm, state_dict: dict[str, Tensor], prefix: str, foreign: Sequence[str]
    ) -> None:
        """Make a state dict fit the layer's own buffers before it is loaded.

        One of a batch norm has none of them: they begin as in a new layer. Those of other modes
        (`foreign`) are of no use here and are left out.
        """
        for name in foreign:
            state_dict.pop(f"{prefix}{name}", None)
        own = self.buffer_names
        if not own or any(_is_brought(layer, name, state_dict, prefix) for name in own):
            return
        if _is_brought(layer, "running_mean", state_dict, prefix):
            device = state_dict[f"{prefix}running_mean"].device
            new = self.buffers(layer.num_features, device)
            state_dict |= {f"{prefix}{name}": value for name, value in new.items()}


def _is_brought(layer: nn.Module, name: str, state_dict: Mapping[str, Tensor], prefix: str) -> bool:
    """True if an entry of a state dict comes from outside of the layer.

    torch's distributed checkpointing completes a state dict by the model's own entries.
    """
    value, own = state_dict.get(f"{prefix}{name}"), layer._buffers.get(name)
    if not isinstance(value, Tensor) or own is None or value.is_meta or own.is_meta:
        return isinstance(value, Tensor) and not value.is_meta
    return value.device != own.device or not value.is_set_to(own)
