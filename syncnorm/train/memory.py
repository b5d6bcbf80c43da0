"""An estimate of the memory that a worker's part of a step needs, before the first is tried.

    need = the process with its data
         + parameters * (value + gradient + what optimizer and average keep)
         + samples in a forward * bytes per sample

Bytes per sample are those that a forward of a few samples saves for its backward pass; on a GPU
those by which the peak of both passes grows, if that is more. On a CPU the process counts, and is
the greatest part with small networks; on a GPU it lies elsewhere.
"""

import copy
import logging
import reprlib
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from syncnorm import rng, system
from syncnorm.comm import exchange
from syncnorm.errors import ConfigError, in_one_line
from syncnorm.family.layer import Pooling
from syncnorm.model.modes import evaluating
from syncnorm.module import SyncNorm
from syncnorm.placement import size
from syncnorm.statistics import mode_of
from syncnorm.train import optim
from syncnorm.train.config.schema import Config
from syncnorm.train.data.feed import TRAIN, Feed, judged_split
from syncnorm.train.setup import autocast, our_layers
from syncnorm.train.task import Task
from syncnorm.train.task.losses import loss_terms
from syncnorm.train.task.measures import check_metrics
from syncnorm.train.task.meters import Meters
from syncnorm.train.waiting import from_all
from syncnorm.train.workers import Workers, place_step

_log = logging.getLogger(__name__)

GIB = 2**30
_TRIAL_SAMPLES = 4
# So much may chance (dropout, say) change a mean; a sum doubles.
_SAME = 0.2
# What does not depend on the samples is the same to rounding.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Need:
    """The memory that a step of a worker needs, in bytes.

    Args:
        process: interpreter, libraries and data set, before there is a model.
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
    process = 0 if workers.device.type == "cuda" else max(system.resident_memory() - parameters, 0)
    with rng.kept():
        per_sample = _try_step(config, workers, feed, model, task)
    # The first worker has most.
    most = max(_forward_sizes(config, model, workers.world_size, feed.sizes[TRAIN], rank=0))
    return Need(process, fixed, per_sample, most)


def _try_step(config: Config, workers: Workers, feed: Feed, model: nn.Module, task: Task) -> int:
    """Try the task's loss and metrics on the first samples; the bytes that a sample takes."""
    count = min(_TRIAL_SAMPLES, feed.sizes[TRAIN])
    indices = torch.arange(count, device=feed.index_device)
    batch = feed.load(TRAIN, indices, epoch=1)
    split = judged_split(feed)
    judged = None if split is None else feed.load(split, indices[: feed.sizes[split]])
    trial = _trial_copy(model)
    if trial is None:
        return 0

    def terms_of(part: Any) -> dict[str, tuple[Tensor, Any]]:
        with autocast(config, workers.device):
            return loss_terms(task, trial, part)

    def loss_of(part: Any) -> Tensor:
        return torch.stack([total for total, _ in terms_of(part).values()]).sum()

    is_own = ":" in config.task.name
    if is_own and not getattr(task, "needs_whole_step", False):
        _warn_of_means(terms_of, batch, lambda some: feed.load(TRAIN, some, epoch=1), indices)
    per_sample = _saved_bytes(trial, partial(loss_of, batch)) // count
    half = count // 2
    if workers.device.type == "cuda" and half:
        fewer = feed.load(TRAIN, indices[:half], epoch=1)
        # What the first passes make to keep, such as the libraries' work space, is in neither.
        _peak(trial, partial(loss_of, batch), workers.device)
        less = _peak(trial, partial(loss_of, fewer), workers.device)
        more = _peak(trial, partial(loss_of, batch), workers.device)
        per_sample = max(per_sample, (more - less) // (count - half))
    # A loss that gathers has the samples of others then.
    looks_across = getattr(task, "needs_whole_step", False)
    if not looks_across and any(
        0 in _forward_sizes(config, model, workers.world_size, feed.sizes[TRAIN], rank)
        for rank in range(workers.world_size)
    ):
        _try_empty(terms_of, feed.load(TRAIN, indices[:0], epoch=1), workers.world_size)
    if judged is not None:
        _try_metrics(config, workers, trial, task, judged)
    return per_sample


def _try_empty(
    terms_of: Callable[[Any], dict[str, tuple[Tensor, Any]]], batch: Any, world_size: int
) -> None:
    """Try the loss of a batch without samples, which comes at the end of an epoch at the latest.

    Raises:
        ConfigError: it raises, or is not finite.
    """
    rule = (
        "`task.name` and `model.name` must take a batch without samples, which some of "
        f"{world_size} workers have in a short step, and give a finite loss, got "
    )
    try:
        terms = terms_of(batch)
    except ConfigError:
        raise
    except Exception as error:  # code of a user's may raise anything
        raise ConfigError(
            f"{rule}{in_one_line(error)}. Name sizes in place of -1 in reshape and view; or take "
            "fewer workers, or another train.global_batch."
        ) from error
    bad = [name or "the loss" for name, (total, _) in terms.items() if not total.isfinite()]
    if bad:
        raise ConfigError(
            f"{rule}one that is not in {', '.join(bad)}. A mean over nothing is NaN: give "
            'reduction="sum".'
        )


def _warn_of_means(
    terms_of: Callable[[Any], dict[str, tuple[Tensor, Any]]],
    batch: Any,
    load: Callable[[Tensor], Any],
    indices: Tensor,
) -> None:
    """Warn of losses that are means where sums are asked for: twice the samples leave them alike.

    Their counts do grow; or stay, where fewer samples have another loss. A loss that takes no sample
    twice is not looked at.
    """

    def numbers_of(part: Any) -> dict[str, tuple[float, float]]:
        pairs = terms_of(part).items()
        return {name: (total.item(), float(count)) for name, (total, count) in pairs}

    def is_like(some: dict[str, tuple[float, float]], name: str, share: float) -> bool:
        total = once[name][0]
        return name not in some or abs(some[name][0] - total) <= share * abs(total)

    once = again = numbers_of(batch)
    more: dict[str, tuple[float, float]] = {}
    fewer = more
    with suppress(Exception):  # nothing is exchanged meanwhile
        again = numbers_of(batch)
        more = numbers_of(load(torch.cat([indices] * 2)))
        fewer = numbers_of(load(indices[: -(-len(indices) // 2)]))
    means = [
        name or "the loss"
        for name, (_, count) in once.items()
        if name in more
        and once[name][0]
        and is_like(more, name, _SAME)
        # Chance is not the samples' doing.
        and (
            more[name][1] > count
            or (is_like(again, name, 0) and not is_like(fewer, name, _ROUNDING))
        )
    ]
    if means:
        _log.warning(
            "task.name should give sums, but twice the samples have the same in %s: that looks like "
            'a mean. Give reduction="sum", and the number of samples: by them workers are weighted',
            ", ".join(means),
        )


@torch.no_grad()
def _try_metrics(
    config: Config, workers: Workers, trial: nn.Module, task: Task, batch: Any
) -> None:
    meters: Meters | None = getattr(task, "meters", None)
    with (
        evaluating(trial),
        autocast(config, workers.device),
        exchange.record() as exchanges,
        nullcontext([]) if meters is None else meters.kept() as kept,
    ):
        metrics = task.metrics(trial, batch)
    if exchanges:
        raise ConfigError(
            "`task.name` must measure without exchanges, such as syncnorm.gather's: workers have "
            f"unequally many batches in an evaluation, got {len(exchanges)} for one batch"
        )
    check_metrics(metrics)
    if meters is not None:
        for outputs, targets in kept:
            meters.check(outputs, targets)
    names = [*metrics, *(meters.names if meters is not None else ())]
    best = task.best.removeprefix("-")
    # Of torchmetrics', one of several values has a number with its name.
    bare = best.rstrip("0123456789").removesuffix("_") if meters is not None else best
    if best and best not in names and bare not in names:
        raise ConfigError(
            f"`task.best` must be measured, got {best!r} of "
            f"{', '.join(names) or 'nothing that is'}. Empty is none."
        )


def _trial_copy(model: nn.Module) -> nn.Module | None:
    """Copy the model, its layers set to exchange nothing; None if it cannot be copied."""
    try:
        trial = copy.deepcopy(model)
    except Exception as error:  # modules of a user's may raise anything
        cause = in_one_line(error)
        _log.warning(
            "the model cannot be copied, so what a forward keeps of a sample is not known: %s",
            cause,
        )
        return None
    for layer in trial.modules():
        if isinstance(layer, SyncNorm):
            layer.use_mode(mode_of("none"))
        elif isinstance(layer, Pooling):
            layer.sync = "none"
    return trial


def _saved_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Measure the storages that a forward saves for its backward pass, without the parameters'."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # Held on to, so that no address is given out twice.
            held.append(tensor)
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(seen.values())


def _peak(model: nn.Module, loss: Callable[[], Tensor], device: torch.device) -> int:
    """Measure the peak of both passes on a CUDA device, in bytes."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    loss().backward()
    model.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated(device) - before


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
    """The memory that this worker may use, in bytes; on a CPU including its own by now.

    Args:
        config: may fix it.
        workers: this worker's rank and device.
        started: number of workers of this machine that have started, with this one.
    """
    if config.launch.memory_gib is not None:
        return config.launch.memory_gib * GIB
    if workers.device.type == "cuda":
        return torch.cuda.mem_get_info(workers.device)[0]
    return (system.free_memory() + started * system.resident_memory()) / workers.local_world_size
