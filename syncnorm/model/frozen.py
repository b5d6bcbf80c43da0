"""Training forwards that do not update the running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from syncnorm.family.layer import Pooling
from syncnorm.model.convert.others import check_covers
from syncnorm.module import SyncNorm


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Freeze the running statistics within the block; training forwards still normalise by batch.

    (Those of `EstimatedBatchNorm` and of a BatchChannelNorm with `estimate`, whose statistics are
    estimates that take the batch in first, normalise by the estimates that there are.)

    For forwards that are no step of the training: the second one of sharpness-aware minimisation,
    those of a teacher or for a gradient penalty. Running statistics, their counter (the clock of
    renormalisation's schedule), the averages of `sync="lagged"` and what `monitor` shows stay as
    they are. An update under way is applied first.

    *Collectives*: those of the forwards, except that layers with `sync="running"` send nothing, and
    those with "lagged" only what they wait for: the rest serves updates. Every worker must use the
    block alike.

    Blocks may be nested, in each other and in `accumulate` (whose update then leaves these forwards
    out). A copy of the model that is made within the block is not part of it. `recalibrate` within
    it does what it says.

    Args:
        model: the model whose layers are meant, also one wrapped by DistributedDataParallel.

    Raises:
        InputError: training forwards of the model update running statistics, and none of ours.

    Warns:
        UserWarning: they update some that are not ours, too; these go on following every forward.

    Example:
        >>> import torch
        >>> from syncnorm import SyncBatchNorm
        >>> layer = SyncBatchNorm(3)
        >>> with frozen_statistics(layer):
        ...     _ = layer(torch.randn(8, 3))
        >>> int(layer.num_batches_tracked)
        0
    """
    check_covers(model, "frozen_statistics", acts_on_family=True)
    before = {
        m: m.has_frozen_statistics for m in model.modules() if isinstance(m, SyncNorm | Pooling)
    }
    try:
        for layer in before:
            layer.settle()
            layer.has_frozen_statistics = True
        yield
    finally:
        for layer, was in before.items():
            layer.has_frozen_statistics = was
