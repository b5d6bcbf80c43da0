"""Where this process stands among the workers."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Workers:
    """The group of workers as one of them sees it, however it was launched.

    Args:
        rank: number of this worker.
        world_size: how many there are.
        device: where this worker computes.
        local_world_size: how many share its machine.
    """

    rank: int
    world_size: int
    device: torch.device
    local_world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this worker is the one that writes files and speaks."""
        return self.rank == 0
