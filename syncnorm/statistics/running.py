"""`sync="running"`: local batch statistics, and running statistics pooled off the critical path.

A batch is normalised by its own moments on each worker. The running statistics follow the moments
of the batches of all workers, by one asynchronous message a step for all layers of the model (see
`syncnorm.statistics.pool`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from syncnorm.maths.moments import Raw
from syncnorm.ops import LocalSums, PooledMeans, Statistic
from syncnorm.statistics.pool import MomentsPool, PooledSource
from syncnorm.statistics.source import Mode, Source, Unattached
from syncnorm.statistics.steps import Steps

if TYPE_CHECKING:
    from syncnorm.module import SyncNorm


class RunningSource(PooledSource):
    """The layers of one model that pool their running statistics together.

    Args:
        layers: by name, in the same order on all workers, over the same process group.
    """

    pool: MomentsPool

    def __init__(self, layers: dict[str, SyncNorm]) -> None:
        self.pool = MomentsPool(self, layers)
        self._steps = Steps(self.pool)

    def statistic(self, layer: SyncNorm, local: LocalSums) -> Statistic:
        if not self._steps.is_open:
            self.pool.check_outside(layer, local)
        batch = Raw(local.sums, local.has_several)
        shard = None if layer.has_frozen_statistics else self.pool.shard(layer, local)
        return Statistic(batch, PooledMeans(batch, None, layer.label, shard), is_pooled=False)


class RunningMode(Mode):
    name: ClassVar[str] = "running"
    normalizes_pooled: ClassVar[bool] = False

    def new_source(self) -> Source:
        return Unattached()

    def attach(self, layers: dict[str, SyncNorm], model: nn.Module) -> None:
        RunningSource(layers).steps.attach(model)

    def flat_sizes(self, channels: Sequence[int], workers: int) -> list[int]:
        return [sum(2 * each + 1 for each in channels) + workers]
