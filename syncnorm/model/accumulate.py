"""One update of the running statistics for several forwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from syncnorm.errors import InputError
from syncnorm.model.convert.others import check_covers
from syncnorm.model.join.join import is_open
from syncnorm.module import SyncNorm
from syncnorm.statistics.accumulated import Accumulating


@contextmanager
def accumulate(model: nn.Module) -> Iterator[None]:
    """Make one update of the running statistics for all training forwards within the block.

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
        InputError: the model is already accumulating, or has `sync="running"` within `join`; or its
            training forwards update running statistics, and none of batch norms of ours.

    Warns:
        UserWarning: they update some of other layers, too, such as those of `syncnorm.family`;
            these go on following every forward.

    Example:
        >>> from syncnorm import SyncBatchNorm
        >>> layer = SyncBatchNorm(3)
        >>> with accumulate(layer):
        ...     for micro_batch in torch.randn(4, 8, 3):
        ...         _ = layer(micro_batch)
        >>> int(layer.num_batches_tracked)
        1
    """
    check_covers(model, "accumulate", acts_on_family=False)
    layers = [m for m in model.modules() if isinstance(m, SyncNorm)]
    sources = {id(m.statistics): m.statistics for m in layers}.values()
    if any(source.is_accumulating for source in sources):
        raise InputError(
            "`model` must not be accumulating already, got one within its own block, or in a step "
            "of an ElasticBatchSampler with `micro_batch`. Use one block, or call `advance`."
        )
    # Layers of a common pool take the block as one long step; any other collects its own moments.
    steps = [source.steps for source in sources if source.steps is not None]
    if steps and is_open():
        raise InputError(
            '`model` must have sync="batch" or "none" for accumulate within `join`, got "running". '
            "Where a worker's data ends within the block, the others would wait."
        )
    alone = {m: Accumulating(m.statistics) for m in layers if m.statistics.steps is None}
    for each in steps:
        each.begin_block()
    for layer, accumulating in alone.items():
        layer.statistics = accumulating
    for each in steps:
        each.is_held = True
    try:
        yield
        with torch.no_grad():
            for layer, accumulating in alone.items():
                accumulating.apply(layer)
        for each in steps:
            each.end_block()
    except BaseException:
        for each in steps:
            each.listener.drop()
        raise
    finally:
        for layer, accumulating in alone.items():
            layer.statistics = accumulating.source
        for each in steps:
            each.is_held = False
