"""Resources of this machine that workers share: cores, CUDA devices, memory."""

import torch

from syncnorm.errors import ConfigError
from syncnorm.system import count_cores, free_memory, resident_memory
from syncnorm.train.config.schema import LaunchSection
from syncnorm.train.memory import GIB, format_bytes


def choose_device(wanted: str, local_rank: int, local_world_size: int) -> torch.device:
    """Give each local worker a CUDA device of its own, or all of them the CPU.

    Args:
        wanted: the configuration's `launch.device`.
        local_rank: number of the worker on this machine.
        local_world_size: number of workers on this machine.

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


def check_capacity(launch: LaunchSection, device: torch.device) -> str | None:
    """Refuse more workers than fit into memory, before one is started.

    Returns:
        A warning if CPU workers outnumber the cores.

    Raises:
        ConfigError: with the figures.
    """
    count = launch.most_workers
    # A worker imports what this process has, and more.
    each = resident_memory()
    if launch.memory_gib is not None and device.type == "cpu":
        check_memory_limit(each, launch.memory_gib)
    check_free_memory(count, each, free_memory())
    return None if device.type == "cuda" else core_warning(count, count_cores())


def check_memory_limit(each: float, memory_gib: float) -> None:
    """Raise ConfigError unless a process of `each` bytes fits into `memory_gib`."""
    if each > memory_gib * GIB:
        raise ConfigError(
            f"`launch.memory_gib` must be more than {each / GIB:.2f}, which a worker takes before "
            f"it has data and a model, got {memory_gib:g}. Give it more."
        )


def check_free_memory(count: int, each: float, free: float) -> None:
    """Raise ConfigError unless `count` processes of `each` bytes fit into `free` bytes."""
    if count * each > free:
        raise ConfigError(
            f"`launch.workers` must be at most {int(free // each)} on this machine, got {count}: a "
            f"worker takes {format_bytes(each)} and more before it has data and a model, and "
            f"{format_bytes(free)} are free. Take fewer."
        )


def core_warning(count: int, cores: float) -> str | None:
    """Return a warning if `count` workers share fewer cores."""
    if count <= cores:
        return None
    return (
        f"{count} workers share {cores:g} core(s): a step takes longer than with "
        f"{max(int(cores), 1)} worker(s)"
    )
