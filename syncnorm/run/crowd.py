"""Whether so many workers have room on this machine, before one is started."""

import torch

from syncnorm.errors import ConfigError
from syncnorm.run.machine import cores
from syncnorm.train.config.schema import LaunchSection
from syncnorm.train.memory import GIB, format_bytes, free_memory, resident_memory


def check_crowd(launch: LaunchSection, device: torch.device) -> str | None:
    """Refuse more workers than fit into memory; a sentence if they are more than cores.

    Raises:
        ConfigError: with the figures.
    """
    count = launch.most_workers
    # A worker imports what this process has, and more.
    each = resident_memory()
    if launch.memory_gib is not None and device.type == "cpu":
        refuse_small(each, launch.memory_gib)
    else:
        refuse_many(count, each, free_memory())
    return None if device.type == "cuda" else crowded(count, cores())


def refuse_small(each: float, memory_gib: float) -> None:
    """ConfigError unless a process fits into `memory_gib`."""
    if each > memory_gib * GIB:
        raise ConfigError(
            f"`launch.memory_gib` must be more than {each / GIB:.2f}, which a worker takes before "
            "it has data and a "
            f"model, got {memory_gib:g}. Give it more."
        )


def refuse_many(count: int, each: float, free: float) -> None:
    """ConfigError unless `count` processes of `each` bytes fit into `free` bytes."""
    if count * each > free:
        raise ConfigError(
            f"`launch.workers` must be at most {int(free // each)} on this machine, got {count}: a "
            "worker takes "
            f"{format_bytes(each)} and more before it has data and a model, and {format_bytes(free)} are "
            "free. Take fewer."
        )


def crowded(count: int, cores: float) -> str | None:
    """Say that workers wait for each other, if they do."""
    if count <= cores:
        return None
    return f"{count} workers share {cores:g} core(s): a step takes longer than with {max(int(cores), 1)} worker(s)"
