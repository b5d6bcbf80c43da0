"""Several forwards, one update of the running statistics: the source that layers have meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from syncnorm.maths.moments import Moments, Raw
from syncnorm.ops import LocalSums, Statistic
from syncnorm.statistics.source import Lent, Source
from syncnorm.undocumented import disable_dynamo, unseen_by_selective_checkpoint

if TYPE_CHECKING:
    from syncnorm.module import SyncNorm


class Accumulating(Lent):
    """A layer's own source, except that what it records is added up and kept."""

    @property
    def is_accumulating(self) -> bool:
        return True

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.total: Tensor | None = None
        """The raw sums of all forwards: they have the same bits on all workers, whichever kernels
        took their batches."""

    @disable_dynamo
    @unseen_by_selective_checkpoint
    def forward(self, layer: SyncNorm, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.source.forward(layer, x, mask)

    def statistic(self, layer: SyncNorm, local: LocalSums) -> Statistic:
        return self.source.statistic(layer, local)

    def evaluate(self, layer: SyncNorm, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.source.evaluate(layer, x, mask)

    def record(self, layer: SyncNorm, local: LocalSums, moments: Moments) -> None:
        if local.tracer is None and layer.is_tracking:
            sums, is_raw = moments.packed
            assert is_raw
            self.total = sums if self.total is None else self.total + sums

    def discard(self, layer: SyncNorm) -> None:
        self.total = None
        super().discard(layer)

    @disable_dynamo
    def apply(self, layer: SyncNorm) -> None:
        """Have the running statistics follow all that was recorded."""
        if self.total is not None:
            layer.update_running(Raw(self.total), layer.momentum)
