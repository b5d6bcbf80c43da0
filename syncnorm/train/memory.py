"""An estimate of the memory that a worker's part of a step needs, before the first is tried.

    need = the process with its data
         + parameters * (value + gradient + what optimizer and average keep)
         + samples in a forward * bytes per sample

Bytes per sample are those that a forward of a few samples saves for its backward pass; on a GPU
those by which the peak of both passes grows, if that is more. On a CPU the process counts, and is
the greatest part with small networks; on a GPU it lies elsewhere, but for data in memory.
"""

import reprlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from syncnorm import rng, system
from syncnorm.errors import ConfigError, in_one_line
from syncnorm.placement import size
from syncnorm.train import optim
from syncnorm.train.config.schema import Config
from syncnorm.train.data.feed import TRAIN, Feed
from syncnorm.train.setup import our_layers
from syncnorm.train.task import Task
from syncnorm.train.trial import try_task
from syncnorm.train.waiting import from_all
from syncnorm.train.workers import Workers, place_step

GIB = 2**30


@dataclass(frozen=True)
class Need:
    """The memory that a step of a worker needs, in bytes.

    Args:
        process: interpreter, libraries and data set, before there is a model; on a GPU what of the
            data set lies there.
        fixed: parameters, gradients, states of the optimizer, moving average.
        per_sample: kept by a forward for its backward pass, for each sample; on a GPU also what
            both passes need besides.
        samples: number in the largest forward of any worker.
    """

    process: int
    fixed: int
    per_sample: int
    samples: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.process + self.fixed + self.per_sample * self.samples

    def __str__(self) -> str:
        return (
            f"{format_bytes(self.total)}: {format_bytes(self.process)} for the process with its "
            f"data, {format_bytes(self.fixed)} for parameters, gradients and optimizer, and "
            f"{self.samples} samples in a forward of {format_bytes(self.per_sample)} each"
        )


def peak_memory(device: torch.device) -> int:
    """Measure the peak memory of this process in bytes, on a GPU that of its tensors there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return system.peak_resident_memory()


def format_bytes(count: float) -> str:
    """Write a number of bytes for people, such as 1.50 GiB."""
    units = ((GIB, "GiB"), (2**20, "MiB"), (1024, "KiB"))
    size, unit = next((each for each in units if count >= each[0]), units[-1])
    return f"{count / size:.2f} {unit}"


def check_memory(
    config: Config, workers: Workers, feed: Feed, model: nn.Module, task: Task
) -> None:
    """Refuse a step that does not fit, and a task that does not fit model and data.

    *Collectives*: one gathering of each worker's need and free memory; every worker must call.

    Args:
        config: of the run.
        workers: this worker's rank and device.
        feed: of the data.
        model: of `make_bare_model`; is not changed.
        task: of `task_of`.

    Raises:
        ConfigError: with the figures; on all workers, if one has too little.
    """
    mine = (
        estimate(config, workers, feed, model, task),
        available_bytes(config, workers, workers.local_world_size),
    )
    all_workers = from_all(mine)
    poorest = min(
        range(workers.world_size),
        key=lambda rank: all_workers[rank][1] - all_workers[rank][0].total,
    )
    check_fits(*all_workers[poorest], poorest)


def check_fits(need: Need, free: float, rank: int) -> None:
    """Raise ConfigError unless a step fits into `free` bytes of worker `rank`."""
    if need.total <= free:
        return
    fitting = int((free - need.process - need.fixed) // max(need.per_sample, 1))
    remedy = (
        f"Set launch.micro_batch to at most {fitting}, or take more workers."
        if fitting > 0
        else "Take fewer workers, a smaller model or more memory."
    )
    raise ConfigError(
        "`launch.micro_batch` must be such that a step fits into memory, got one that needs "
        f"{need}. Worker {rank} has {format_bytes(free)}. {remedy}"
    )


def estimate(config: Config, workers: Workers, feed: Feed, model: nn.Module, task: Task) -> Need:
    """Estimate the need of the busiest worker. No exchange.

    The task's loss and metrics are tried on the first samples. The model and the random numbers
    stay as they are.

    Raises:
        ConfigError: the samples, the model or the task are not what they must be.
    """
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    # Before the process is measured: the first optimizer imports much.
    fixed = parameters * (2 + _states_per_parameter(config, workers.device))
    # The process has the parameters already, which `fixed` counts.
    process = max(_taken(workers.device) - parameters, 0)
    forwards = [
        _forward_sizes(config, model, workers.world_size, feed.sizes[TRAIN], rank)
        for rank in range(workers.world_size)
    ]
    some_are_empty = any(0 in sizes for sizes in forwards)
    with rng.kept():
        per_sample = try_task(config, workers, feed, model, task, some_are_empty=some_are_empty)
    # The first worker has most.
    return Need(process, fixed, per_sample, max(forwards[0]))


def _taken(device: torch.device) -> int:
    """The bytes that this process has by now, on a GPU those of its tensors there."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return system.resident_memory()


def _states_per_parameter(config: Config, device: torch.device) -> int:
    """Count the numbers that the optimizer and the average keep for each parameter.

    Raises:
        ConfigError: the optimizer cannot take a step.
    """
    probe = torch.zeros(8, 8, device=device, requires_grad=True)
    probe.grad = torch.ones_like(probe)
    section = config.train.optimizer
    optimizer = optim.make_optimizer(section.name, [probe], 0.0, section.options)
    try:
        optimizer.step()
    except Exception as error:  # such as an argument that is for CUDA
        raise ConfigError(
            f"`train.optimizer` must step on {device.type}, got {section.name} with "
            f"{reprlib.repr(section.options)}: {in_one_line(error)}"
        ) from None
    states = sum(
        v.numel()
        for state in optimizer.state.values()
        for v in state.values()
        if isinstance(v, Tensor)
    )
    return round(states / probe.numel()) + (config.train.ema is not None)


def _forward_sizes(
    config: Config, model: nn.Module, world_size: int, samples: int, rank: int
) -> list[int]:
    """List the samples of a worker's forwards in a whole step and in an epoch's last one.

    Raises:
        ConfigError: `launch.micro_batch` is too small for one of them.
    """
    global_batch, has_layers = config.train.global_batch, bool(our_layers(model))
    counts = {min(global_batch, samples), (samples - 1) % global_batch + 1}
    steps = [place_step(config, n, rank, world_size, has_layers=has_layers) for n in counts]
    return [sum(map(size, parts)) for step in steps for parts in step.rounds]


def available_bytes(config: Config, workers: Workers, started: int) -> float:
    """The memory that this worker may use, in bytes, including its own by now.

    Args:
        config: may fix it.
        workers: this worker's rank and device.
        started: number of workers of this machine that have started, with this one.
    """
    if config.launch.memory_gib is not None:
        return config.launch.memory_gib * GIB
    if workers.device.type == "cuda":
        # What the estimate's trial has left is kept for the next tensors, and not free for others.
        own = torch.cuda.memory_reserved(workers.device)
        return torch.cuda.mem_get_info(workers.device)[0] + own
    return (system.free_memory() + started * system.resident_memory()) / workers.local_world_size
