"""The workers' parts of a batch, watched for losses that should have been scaled and were not."""

from __future__ import annotations

import math
import warnings

from torch import Tensor

from syncnorm.comm import groups
from syncnorm.errors import UnevenShardsWarning


class Shard:
    """One worker's part of a batch, to notice losses that should have been scaled and were not.

    DistributedDataParallel weights the workers equally, however much of the batch each holds.
    """

    scaled_losses = 0
    """Number of losses that this process has scaled, by `scale_loss` or in its way."""
    has_warned: bool = False
    """True if this process has warned. Once is enough."""

    def __init__(self, count: Tensor) -> None:
        self._count = count
        self._scaled = Shard.scaled_losses

    @property
    def is_scaled(self) -> bool:
        """True if a loss was scaled since the forward."""
        return Shard.scaled_losses != self._scaled

    def on_backward(self, n: float | Tensor, ranks: list[int], name: str) -> None:
        """Warn, once, if the shards are uneven and no loss was scaled before the backward pass.

        Args:
            n: the pooled count; on CUDA a tensor, which is not looked at.
            ranks: the workers.
            name: the layer.
        """
        if not Shard.has_warned and not self.is_scaled and not isinstance(n, Tensor):
            self.compare(n, ranks, name)

    def compare(self, n: float, ranks: list[int], name: str) -> None:
        """Warn if this worker's count is not the mean one."""
        if not is_uneven(self._count, n, len(ranks)):
            return
        count = self._count.item()
        Shard.has_warned = True
        warnings.warn(
            f"workers should hold equal shards, or scale their losses: rank {groups.rank()} had "
            f"{count:g} of {n:g} "
            f"values per channel in {name!r} where each of {len(ranks)} equal shards has "
            f"{n / len(ranks):g}, and "
            "scale_loss was not called before the backward pass. DistributedDataParallel weights "
            "the workers equally, "
            "so the gradient is not that of the whole batch. Add `loss = scale_loss(loss, n)`, n being "
            "what its mean is over: samples, boxes, pixels. A loss that is "
            "weighted in another way needs nothing: filter this UnevenShardsWarning.",
            UnevenShardsWarning,
            stacklevel=2,
        )


def is_uneven(count: Tensor, n: float, workers: int) -> bool:
    """True if one worker's count is not the mean one; False where all have none, or at a fault."""
    # Sums of fractional weights are rounded.
    return n > 0 and not math.isclose(count.item() * workers, n, rel_tol=1e-9)


def of_nothing(loss: Tensor) -> Tensor:
    """Zero, in the loss's graph: a mean over nothing may be NaN."""
    return loss.nan_to_num(0.0) * 0.0


class LateShard(Shard):
    """A shard whose pooled count arrives after the backward pass.

    The backward pass notes whether a loss was scaled before it.
    """

    is_due: bool

    def __init__(self, count: Tensor, name: str) -> None:
        super().__init__(count)
        self.name = name
        self.is_due = False
        """True if there was a backward pass of a loss that was not scaled."""

    def add(self, count: Tensor) -> None:
        """Add the count of another call of the layer in the same step."""
        self._count = self._count + count

    def on_backward(self, n: float | Tensor, ranks: list[int], name: str) -> None:
        """Note if no loss was scaled; `n` is this worker's own count here."""
        self.is_due = self.is_due or not self.is_scaled
