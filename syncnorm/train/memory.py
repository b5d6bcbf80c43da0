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
import resource
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from syncnorm.errors import ConfigError
from syncnorm.module import SyncNorm
from syncnorm.placement import place_local
from syncnorm.statistics import mode_of
from syncnorm.train import optim
from syncnorm.train.config.schema import Config
from syncnorm.train.data.datasets import Dataset, types_of
from syncnorm.train.placement import Workers, place

_log = logging.getLogger(__name__)

GIB = 2**30
_TRIAL_SAMPLES = 4


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


def format_bytes(count: float) -> str:
    """Write a number of bytes for people, such as 1.50 GiB."""
    units = ((GIB, "GiB"), (2**20, "MiB"), (1024, "KiB"))
    size, unit = next((each for each in units if count >= each[0]), units[-1])
    return f"{count / size:.2f} {unit}"


def check_memory(config: Config, workers: Workers, data: Dataset, model: nn.Module) -> None:
    """Refuse a step that does not fit, and a model that is no classifier of the data.

    *Collectives*: one gathering of each worker's need and free memory; every worker must call.

    Args:
        config: of the run.
        workers: this worker's rank and device.
        data: the training set.
        model: of `make_bare_model`; is not changed.

    Raises:
        ConfigError: with the figures; on all workers, if one has too little.
    """
    mine = (
        estimate(config, workers, data, model),
        available_bytes(config, workers, workers.local_world_size),
    )
    all_workers = [mine] * workers.world_size
    dist.all_gather_object(all_workers, mine)
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


def estimate(config: Config, workers: Workers, data: Dataset, model: nn.Module) -> Need:
    """Estimate the need of the busiest worker. No exchange.

    The model and the random numbers stay as they are.

    Raises:
        ConfigError: the model does not give logits for each image.
    """
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    # Before the process is measured: the first optimizer imports much.
    fixed = parameters * (2 + _states_per_parameter(config))
    # The process has the parameters already, which `fixed` counts.
    process = 0 if workers.device.type == "cuda" else max(resident_memory() - parameters, 0)
    images = data.standardise(
        data.train.images[:_TRIAL_SAMPLES], getattr(torch, config.train.dtype)
    )
    per_sample = 0
    trial = _trial_copy(model)
    if trial is not None:
        is_cuda = workers.device.type == "cuda"
        with torch.random.fork_rng(devices=[workers.device] if is_cuda else []):
            labels = data.train.labels[:_TRIAL_SAMPLES]
            per_sample = _saved_bytes(trial, images, labels, data.num_classes) // len(images)
            if is_cuda:
                per_sample = max(per_sample, _peak_growth(trial, images, labels))
    return Need(process, fixed, per_sample, _most_samples(config, workers.world_size))


def _trial_copy(model: nn.Module) -> nn.Module | None:
    """Copy the model, its layers set to exchange nothing; None if it cannot be copied."""
    try:
        trial = copy.deepcopy(model)
    except Exception as error:  # modules of a user's may raise anything
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        _log.warning(
            "the model cannot be copied, so what a forward keeps of a sample is not known: %s",
            cause,
        )
        return None
    for layer in trial.modules():
        if isinstance(layer, SyncNorm):
            layer.use_mode(mode_of("none"))
    return trial


def _saved_bytes(model: nn.Module, images: Tensor, labels: Tensor, num_classes: int) -> int:
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
        logits = model(images)
        _check_logits(logits, len(labels), num_classes)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        del loss
    return sum(seen.values())


def _peak_growth(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Measure by how much a sample more lifts the peak of a step on a CUDA device, in bytes."""
    half = len(images) // 2
    if not half:
        return 0
    # What the first passes make to keep, such as the libraries' work space, is in neither.
    _peak(model, images, labels)
    less, more = _peak(model, images[:half], labels[:half]), _peak(model, images, labels)
    return (more - less) // (len(images) - half)


def _peak(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    before = torch.cuda.memory_allocated(images.device)
    torch.cuda.reset_peak_memory_stats(images.device)
    F.cross_entropy(model(images), labels, reduction="sum").backward()
    model.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated(images.device) - before


def _check_logits(logits: object, count: int, num_classes: int) -> None:
    """Refuse logits that the loss would misread or fail on."""
    got = types_of(logits)
    if isinstance(logits, Tensor):
        # A pretrained head may have more classes.
        if logits.ndim == 2 and len(logits) == count and logits.shape[1] >= num_classes:
            return
        got = f"shape {tuple(logits.shape)}"
    raise ConfigError(
        "`model.name` must give a model from images (N, C, H, W) to a tensor of logits (N, "
        f"num_classes), got {got} for {count} images of {num_classes} classes. Wrap a model that "
        "returns something else."
    )


def _states_per_parameter(config: Config) -> int:
    """Count the numbers that the optimizer and the average keep for each parameter."""
    probe = torch.zeros(8, 8, requires_grad=True)
    probe.grad = torch.ones(8, 8)
    section = config.train.optimizer
    optimizer = optim.make_optimizer(section.name, [probe], 0.0, section.options)
    optimizer.step()
    states = sum(
        v.numel()
        for state in optimizer.state.values()
        for v in state.values()
        if isinstance(v, Tensor)
    )
    return round(states / probe.numel()) + (config.train.ema is not None)


def _most_samples(config: Config, world_size: int) -> int:
    count, micro_batch = config.train.global_batch, config.launch.micro_batch
    if config.norm.mode.pools_each_batch():
        first = place(count, config.norm_batch, 0, world_size, micro_batch)
    else:
        first = place_local(count, 0, world_size, micro_batch)
    return max(sum(part.stop - part.start for part in parts) for parts in first.rounds)


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
    return (free_memory() + started * resident_memory()) / workers.local_world_size


def resident_memory() -> int:
    """The resident memory of this process, in bytes; 0 where it is not known."""
    try:
        return (
            int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            * resource.getpagesize()
        )
    except (OSError, ValueError):
        return 0


def free_memory() -> float:
    """Free memory of this machine or of its control group, in bytes; infinite if not known."""
    limits = [float("inf")]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits += [
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")
        ]
        group = Path("/sys/fs/cgroup")
        bound = (group / "memory.max").read_text(encoding="ascii").strip()
        if bound.isdecimal():
            limits.append(int(bound) - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass
    return min(limits)
