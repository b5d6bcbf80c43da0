"""Several forwards, one update of the running statistics."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from syncnorm.errors import InputError
from syncnorm.maths.moments import Moments, merge
from syncnorm.model.convert.others import check_covers
from syncnorm.module import Call, StatisticsSource, SyncNorm
from syncnorm.ops import LocalSums, Statistic
from syncnorm.statistics.running import PooledRunning


class Accumulating:
    """Takes a layer's statistics from where they came from before, and merges what it should
    record.
    """

    def __init__(self, source: StatisticsSource) -> None:
        self.source = source
        self.total: Moments | None = None

    def take(self, layer: SyncNorm, local: LocalSums, call: Call) -> Statistic:
        return self.source.take(layer, local, call)

    def record(self, layer: SyncNorm, statistic: Statistic) -> None:
        self.total = statistic.batch if self.total is None else merge(self.total, statistic.batch)

    def parts(self, count: int) -> Sequence[int] | None:
        return self.source.parts(count)

    def settle(self) -> None:
        self.source.settle()

    def forget(self, layer: SyncNorm) -> None:
        self.total = None
        self.source.forget(layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> StatisticsSource:
        # A copy made within the block is not part of it.
        return copy.deepcopy(self.source, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        # Nor is what is loaded from a pickle.
        return _itself, (self.source,)


def _itself(source: StatisticsSource) -> StatisticsSource:
    return source


@contextmanager
def accumulate(model: nn.Module) -> Iterator[None]:
    """Within the block, any number of training forwards of `model` make one update of the running
    statistics.

    The update is that of all micro-batches as one batch: moments merged by count over rounds and
    workers, made at the end of the block. Each forward still normalises by its own batch;
    renormalisation's r and d refer to the running statistics, and its schedule to the clock, as
    they were before the block. If the block raises, no update is made; a forward that raises and is
    caught within the block may be part of it.

    *Collectives*: those of the forwards; for layers with `sync="running"` or "lagged" one flat
    exchange at the end of the block in place of one per forward. Every worker must use the block
    alike.

    Args:
        model: the model whose layers are meant; one given to prepare_ddp if it has "running" or
            "lagged" layers.

    Raises:
        InputError: the model is already accumulating; or its training forwards update running
            statistics, and none of ours.

    Warns:
        UserWarning: they update some that are not ours, too; these go on following every forward.

    Example:
        >>> from syncnorm import SyncBatchNorm
        >>> layer = SyncBatchNorm(3)
        >>> with accumulate(layer):
        ...     for micro_batch in torch.randn(4, 8, 3):
        ...         _ = layer(micro_batch)
        >>> int(layer.num_batches_tracked)
        1
    """
    check_covers(model, "accumulate")
    layers = [m for m in model.modules() if isinstance(m, SyncNorm)]
    together = {
        id(m.statistics): m.statistics for m in layers if isinstance(m.statistics, PooledRunning)
    }
    if any(isinstance(m.statistics, Accumulating) for m in layers) or any(
        p.is_held for p in together.values()
    ):
        raise InputError(
            "`model` must not be accumulating already, got one within its own block. Use one block."
        )
    alone = {m: Accumulating(m.statistics) for m in layers if id(m.statistics) not in together}
    for pool in together.values():
        pool.start()
    for layer, accumulating in alone.items():
        layer.statistics = accumulating
    for pool in together.values():
        pool.is_held = True
    try:
        yield
        with torch.no_grad():
            for layer, accumulating in alone.items():
                if accumulating.total is not None:
                    layer.update_running(accumulating.total, layer.momentum)
        for pool in together.values():
            pool.launch()
    except BaseException:
        for pool in together.values():
            pool.drop()
        raise
    finally:
        for layer, accumulating in alone.items():
            layer.statistics = accumulating.source
        for pool in together.values():
            pool.is_held = False
