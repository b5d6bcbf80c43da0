"""The workers of a run, and the placement of its steps, checked against the configuration."""

from dataclasses import dataclass

import torch

from syncnorm import placement
from syncnorm.errors import ConfigError
from syncnorm.placement import Placement
from syncnorm.train.config.schema import Config


@dataclass(frozen=True)
class Workers:
    """The group of workers as one of them sees it, however it was launched.

    Args:
        rank: number of this worker.
        world_size: number of workers.
        device: the device that this worker computes on.
        local_world_size: number of workers on its machine.
    """

    rank: int
    world_size: int
    device: torch.device
    local_world_size: int = 1

    @property
    def is_first(self) -> bool:
        """True on the worker that writes files and prints."""
        return self.rank == 0


def place_step(
    config: Config, count: int, rank: int, world_size: int, *, has_layers: bool
) -> Placement:
    """Place a step of `count` samples as the configuration says.

    Args:
        config: of the run.
        count: the step's samples.
        rank, world_size: of the worker whose part it is.
        has_layers: True if the network has layers of ours, whose statistics are to be whole.

    Raises:
        ConfigError: see `place_checked`.
    """
    micro_batch = config.launch.micro_batch
    if config.norm.mode.pools_each_batch() and has_layers:
        return place_checked(count, config.norm_batch, rank, world_size, micro_batch)
    return placement.place_local(count, rank, world_size, micro_batch)


def place_checked(
    count: int, norm_batch: int, rank: int, world_size: int, micro_batch: int | None
) -> Placement:
    """Place a step as `syncnorm.placement.place` does.

    Raises:
        ConfigError: a worker's part of a norm batch is more than `micro_batch`; the same on all
            workers.
    """
    wrong = placement.too_few_at_once(count, norm_batch, world_size, micro_batch)
    if wrong:
        raise ConfigError(f"`launch.micro_batch` {wrong}")
    return placement.place(count, norm_batch, rank, world_size, micro_batch)
