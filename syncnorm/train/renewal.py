"""Statistics of a moving average's own.

An average of running statistics is that of the networks that trained, not of the averaged network:
its variances are too large, and the more so the longer the average reaches back. So, before it is
judged, the averaged network sees part of the training set, and gets the statistics of that.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm import recalibrate
from syncnorm.model.worker_failures import NotFiniteFault
from syncnorm.placement import epoch_order
from syncnorm.train.data.batches import ReadFailure
from syncnorm.train.data.feed import TRAIN, Feed
from syncnorm.train.setup import Setup
from syncnorm.train.step import raise_read_failure
from syncnorm.train.task import Task

_log = logging.getLogger(__name__)

# So that its time does not grow with the training set.
_MOST_SAMPLES = 8192
# In a forward, which keeps nothing for a backward pass. Not launch.micro_batch: each layer sees
# what those before it make of a batch, so the result would depend on it.
_MOST_AT_ONCE = 64


def renew_statistics(
    setup: Setup, feed: Feed, epoch: int, alive: Callable[[], object] = lambda: None
) -> None:
    """Give the moving average, if there is one, the statistics of its own activations.

    They are those of up to 8192 samples, as an evaluation sees them, the first in the order of the
    epoch; the same on any number of workers, to rounding. Methods of `syncnorm.family` keep the
    average of theirs. Where activations are not finite nothing changes, and a warning says so.

    *Collectives*: the sum of `syncnorm.recalibrate`, and a gathering of failures; every worker must
    call.

    Raises:
        ConfigError: samples cannot be read; on all workers.
    """
    if setup.average is None or not has_statistics(setup.average.module):
        return
    config, workers, failures = setup.config, setup.workers, [""]
    order = epoch_order(feed.sizes[TRAIN], config.train.seed, epoch)[:_MOST_SAMPLES]
    chunks = order.to(feed.index_device).split(min(config.norm_batch, _MOST_AT_ONCE))
    mine = chunks[workers.rank :: workers.world_size]

    def batches() -> Iterator[tuple[Any]]:
        for batch in feed.batches(TRAIN, mine):
            if isinstance(batch, ReadFailure):
                failures.append(batch.message)
                return
            yield (batch,)
            alive()

    try:
        with setup.autocast():
            recalibrate(Judged(setup.average.module, setup.task), batches())
    except NotFiniteFault as fault:
        _log.warning("the moving average keeps its running statistics: %s", fault)
    raise_read_failure(failures[-1])


class Judged(nn.Module):
    """A network called as the task calls it."""

    training: bool

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        # Hidden from torch: a task may be a module, whose layers are not the network's.
        self._measure = lambda batch: task.metrics(model, batch)
        self.training = model.training

    def forward(self, batch: Any) -> None:
        self._measure(batch)


def has_statistics(model: nn.Module) -> bool:
    """True if there is a batch norm that `syncnorm.recalibrate` gives new statistics."""
    return any(
        isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and (module.training or not model.training)
        for module in model.modules()
    )
