"""`sync="batch"` where a step has several statistics, each over some of its samples.

The layers pool each statistic over a group of workers, or take it alone, perhaps several of one
forward side by side ("ghost batches"). The running statistics are those of all samples of all
workers: the layers leave the raw sums of their batches as `sync="running"` does, and they go out in
one flat asynchronous message.
"""

from __future__ import annotations

from collections.abc import Sequence

from syncnorm import ops
from syncnorm.comm import groups
from syncnorm.errors import InputError
from syncnorm.module import Call, SyncNorm
from syncnorm.ops import LocalSums, Statistic
from syncnorm.statistics.running import PooledRunning


class StatisticGroups(PooledRunning):
    """The layers of one model, told before each forward what their statistics are taken over; their
    `statistics`.

    Args:
        layers: the layers by name, in the same order on all workers, over the same process group.
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

    def parts(self, count: int) -> list[int] | None:
        if len(self._parts) <= 1:
            return None
        times, rest = divmod(count, sum(self._parts)) if sum(self._parts) else (0, count)
        if rest:
            raise InputError(
                f"`x` must hold a whole number of rows for each of {sum(self._parts)} samples "
                "where a forward has "
                f"several statistics, got {count} rows. Keep the samples in dimension 0."
            )
        return [times * part for part in self._parts]

    def take(self, layer: SyncNorm, local: LocalSums, call: Call) -> Statistic:
        self._leave(layer, local, call)
        return ops.pooled_statistic(local, self._over, layer.label)

    def __getstate__(self) -> dict[str, object]:
        # A process group can be neither copied nor pickled, and a copy is placed anew.
        return {**super().__getstate__(), "_over": None, "_parts": []}
