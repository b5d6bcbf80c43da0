"""A step of the training taken apart: its statistics, and the workers' parts of each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from syncnorm.diagnose.observe import pools
from syncnorm.placement import norm_batches, place, place_local, shard, size
from syncnorm.train.config.schema import Config
from syncnorm.train.task import Task

Part = dict[int, slice]
"""The places in the step of a statistic's samples, by the worker of the training that had them."""


@dataclass(frozen=True)
class Plan:
    """The statistics of a step.

    Args:
        workers: of the training.
        statistics: each is one forward.
        is_pooled: True if every worker takes part in every forward, with samples or without.
    """

    workers: int
    statistics: list[Part]
    is_pooled: bool

    @property
    def smallest(self) -> int:
        """The samples of the smallest statistic."""
        return min(sum(map(size, each.values())) for each in self.statistics)

    def of_worker(self, rank: int, world_size: int) -> list[Part]:
        """List the forwards of a worker of a diagnosis: each takes whole parts."""
        own = shard(self.workers, rank, world_size)
        mine = [
            {p: cut for p, cut in each.items() if own.start <= p < own.stop}
            for each in self.statistics
        ]
        return mine if self.is_pooled else [each for each in mine if each]


def plan_step(config: Config, model: nn.Module, task: Task, workers: int, samples: int) -> Plan:
    """Take a step of `samples` samples apart as so many workers had it.

    Where layers pool each batch, a statistic is a norm batch. Layers of local statistics have one
    for each worker's forward. Layers that normalise by averages, and losses that look across the
    batch, get the step whole.
    """
    is_whole = bool(getattr(task, "needs_whole_step", False))
    if not is_whole and not any(pools(module) for module in model.modules()):
        micro_batch = config.launch.micro_batch
        return Plan(
            workers,
            [
                {p: cut}
                for p in range(workers)
                for cuts in place_local(samples, p, workers, micro_batch).rounds
                for cut in cuts
                if size(cut)
            ],
            is_pooled=False,
        )
    is_cut = config.norm.mode.pools_each_batch() and not is_whole
    norm_batch = min(config.norm_batch, samples) if is_cut else samples
    places = {
        p: [cut for cuts in place(samples, norm_batch, p, workers, None).rounds for cut in cuts]
        for p in range(workers)
    }
    return Plan(
        workers,
        [
            {
                p: cut
                for p, cuts in places.items()
                for cut in cuts
                if whole.start <= cut.start and cut.stop <= whole.stop and size(cut)
            }
            for whole in norm_batches(samples, norm_batch)
        ],
        is_pooled=True,
    )
