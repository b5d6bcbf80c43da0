"""`sync="batch"` where a step has several statistics, each over some of its samples.

The layers pool each statistic over a group of workers, or take it alone, perhaps several of one
forward side by side ("ghost batches"). The running statistics are those of all samples of all
workers: the layers leave the raw sums of their batches as with `sync="running"`, and they go out
in one flat asynchronous message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from syncnorm import ops
from syncnorm.comm import groups
from syncnorm.errors import InputError
from syncnorm.ops import LocalSums, Statistic
from syncnorm.statistics.running import RunningSource
from syncnorm.undocumented import disable_dynamo, unseen_by_selective_checkpoint

if TYPE_CHECKING:
    from syncnorm.module import SyncNorm


class StatisticGroups(RunningSource):
    """The layers of one model, told before each forward what their statistics are taken over.

    Args:
        layers: by name, in the same order on all workers, over the same process group.
    """

    def __init__(self, layers: dict[str, SyncNorm]) -> None:
        super().__init__(layers)
        self._over: groups.Group | None = None
        self._parts: list[int] = []

    def place(self, over: groups.Group | None, parts: Sequence[int]) -> None:
        """Say what the statistics of the next forwards are taken over.

        Args:
            over: the workers that share each statistic; None: this one has it alone.
            parts: how many samples of this worker's input are of each statistic, in the order of
                the input.
        """
        self._over = over
        self._parts = list(parts)

    @disable_dynamo
    @unseen_by_selective_checkpoint
    def forward(self, layer: SyncNorm, x: Tensor, mask: Tensor | None) -> Tensor:
        parts = self._rows(x.shape[0])
        if parts is None:
            return layer.train_forward(x, mask)
        masks = [None] * len(parts) if mask is None else mask.split(parts)
        ys = [layer.train_forward(x, mask) for x, mask in zip(x.split(parts), masks, strict=True)]
        return torch.cat(ys)

    def _rows(self, count: int) -> list[int] | None:
        """Rows of each statistic in an input of `count`; None: there is one."""
        if len(self._parts) <= 1:
            return None
        times, rest = divmod(count, sum(self._parts)) if sum(self._parts) else (0, count)
        if rest:
            raise InputError(
                f"`x` must hold a whole number of rows for each of {sum(self._parts)} samples "
                f"where a forward has several statistics, got {count} rows. Keep the samples in "
                "order in dimension 0, or take a statistic at a time: `micro_batch` of the "
                "sampler, `launch.micro_batch` of the trainer, equal to `norm_batch`."
            )
        return [times * part for part in self._parts]

    def statistic(self, layer: SyncNorm, local: LocalSums) -> Statistic:
        if not self._steps.is_open:
            self.pool.check_outside(layer, local)
        return ops.pooled_statistic(local, self._over, layer.label)

    def __getstate__(self) -> dict[str, Any]:
        # A process group can be neither copied nor pickled, and a copy is placed anew.
        return {**self.__dict__, "_over": None, "_parts": []}
