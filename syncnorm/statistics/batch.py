"""`sync="batch"`: the statistics of the batch over all workers. `sync="none"`: this worker's alone.

A batch is normalised by its own moments, and the running statistics follow at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from syncnorm import ops
from syncnorm.comm import groups
from syncnorm.ops import LocalSums, Statistic
from syncnorm.statistics.source import Mode, Source

if TYPE_CHECKING:
    from syncnorm.module import SyncNorm


class BatchSource(Source):
    """The moments of the batch over the layer's process group, by one exchange.

    *Collectives*: one all-reduce of 2C+2 float64 numbers, and one of as many in the backward pass.
    """

    def statistic(self, layer: SyncNorm, local: LocalSums) -> Statistic:
        group = groups.statistics_group(layer.workers)
        return ops.pooled_statistic(local, group, layer.label, is_averaged=layer.is_prepared)

    def traced_statistic(self, layer: SyncNorm, local: LocalSums) -> Statistic:
        return ops.statistic_if_alone(local, layer.workers, layer.label)


class LocalSource(Source):
    """The moments of this worker's batch. *Collectives*: none."""

    def statistic(self, layer: SyncNorm, local: LocalSums) -> Statistic:
        return ops.local_statistic(local, layer.label)

    traced_statistic = statistic


class BatchMode(Mode):
    name: ClassVar[str] = "batch"

    def new_source(self) -> Source:
        return BatchSource()

    def own_sizes(self, channels: int) -> list[int]:
        return [2 * channels + 1, 2 * channels]


class LocalMode(Mode):
    name: ClassVar[str] = "none"
    is_pooled: ClassVar[bool] = False
    normalizes_pooled: ClassVar[bool] = False

    def new_source(self) -> Source:
        return LocalSource()
