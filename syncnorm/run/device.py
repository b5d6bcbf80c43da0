"""Which device a worker computes on."""

import torch

from syncnorm.errors import ConfigError


def choose_device(wanted: str, local_rank: int, local_world_size: int) -> torch.device:
    """Give each local worker a CUDA device of its own, or all of them the CPU.

    Args:
        wanted: the configuration's `launch.device`.
        local_rank: number of the worker on this machine.
        local_world_size: how many workers share the machine.

    Raises:
        ConfigError: CUDA is wanted and there are fewer devices than workers.
    """
    count = torch.cuda.device_count()
    if wanted == "cuda" and count < local_world_size:
        raise ConfigError(
            f"`launch.device` must be auto or cpu where {local_world_size} workers share "
            f"{count} CUDA devices, got 'cuda'"
        )
    if wanted == "cpu" or count < local_world_size:
        return torch.device("cpu")
    return torch.device("cuda", local_rank)
