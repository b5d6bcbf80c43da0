"""Several forwards, one update of the running statistics: the source that layers have meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from syncnorm.maths.moments import Moments, merge
from syncnorm.ops import LocalSums, Statistic, unexchanged_statistic
from syncnorm.statistics.source import Lent, Source
from syncnorm.undocumented import disable_dynamo

if TYPE_CHECKING:
    from syncnorm.module import SyncNorm


class Accumulating(Lent):
    """A layer's own source, except that what it records is merged and kept."""

    @property
    def is_accumulating(self) -> bool:
        return True

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.total: Moments | None = None

    @disable_dynamo
    def forward(self, layer: SyncNorm, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.source.forward(layer, x, mask)

    def statistic(self, layer: SyncNorm, local: LocalSums) -> Statistic:
        if local.observer is not None:
            return unexchanged_statistic(local, layer.label)
        return self.source.statistic(layer, local)

    def evaluate(self, layer: SyncNorm, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.source.evaluate(layer, x, mask)

    def record(self, layer: SyncNorm, local: LocalSums, batch: Moments) -> None:
        if local.observer is None and layer.is_tracking:
            # A worker without samples has no kernels, whose mean and m2 have bits of their own.
            batch = batch.alike()
            self.total = batch if self.total is None else merge(self.total, batch)

    def discard(self, layer: SyncNorm) -> None:
        self.total = None
        super().discard(layer)

    def apply(self, layer: SyncNorm) -> None:
        """Have the running statistics follow all that was recorded."""
        if self.total is not None:
            layer.update_running(self.total, layer.momentum)
