"""Whether a worker's part of a step fits in its memory, before it is tried.

    need = the process with its data
         + parameters * (value + gradient + what optimizer and average keep)
         + samples in a forward * bytes per sample

Bytes per sample are those that a forward of a few samples leaves for its backward pass. On a CPU
the process counts: with small networks it is most of all; on a GPU it lies elsewhere.
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
from syncnorm.statistics import mode_of
from syncnorm.train import optim
from syncnorm.train.config.schema import Config
from syncnorm.train.data.datasets import Dataset, types_of
from syncnorm.train.placement import place, place_local
from syncnorm.train.workers import Workers

_log = logging.getLogger(__name__)

GIB = 2**30
_TRIED = 4


@dataclass(frozen=True)
class Need:
    """What a step of a worker needs, in bytes.

    Args:
        process: interpreter, libraries and data set, before there is a model.
        fixed: parameters, gradients, and what optimizer and moving average keep.
        per_sample: what a forward leaves for its backward pass, for each sample.
        samples: in the largest forward of any worker.
    """

    process: int
    fixed: int
    per_sample: int
    samples: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.process + self.fixed + self.per_sample * self.samples

    def __str__(self) -> str:
        return (
            f"{in_words(self.total)}: {in_words(self.process)} for the process with its data, "
            f"{in_words(self.fixed)} "
            f"for parameters, gradients and optimizer, and {self.samples} samples in a forward of "
            f"{in_words(self.per_sample)} each"
        )


def in_words(count: float) -> str:
    """A number of bytes, for people."""
    size, unit = next(
        each
        for each in ((GIB, "GiB"), (2**20, "MiB"), (1024, "KiB"))
        if count >= each[0] or each[0] == 1024
    )
    return f"{count / size:.2f} {unit}"


def check_memory(config: Config, workers: Workers, data: Dataset, model: nn.Module) -> None:
    """Refuse a step that does not fit, and a model that is no classifier of the data.

    *Collectives*: one gathering of what each worker needs and has; every worker must call.

    Args:
        config: what is to be trained.
        workers: this worker's place.
        data: the training set.
        model: of `make_bare_model`; stays as it is.

    Raises:
        ConfigError: with the figures; on all workers, if one has too little.
    """
    mine = (
        estimate(config, workers, data, model),
        free_for(config, workers, workers.local_world_size),
    )
    all_workers = [mine] * workers.world_size
    dist.all_gather_object(all_workers, mine)
    poorest = min(
        range(workers.world_size),
        key=lambda rank: all_workers[rank][1] - all_workers[rank][0].total,
    )
    refuse(*all_workers[poorest], poorest)


def refuse(need: Need, free: float, rank: int) -> None:
    """ConfigError unless a step fits into `free` bytes of worker `rank`."""
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
        f"{need}. "
        f"Worker {rank} has {in_words(free)}. {remedy}"
    )


def estimate(config: Config, workers: Workers, data: Dataset, model: nn.Module) -> Need:
    """What a step of the busiest worker needs. No exchange; the model and random numbers stay as
    they are.

    Raises:
        ConfigError: the model does not give logits for each image.
    """
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    # Before the process is measured: the first optimizer imports much.
    fixed = parameters * (2 + _copies(config))
    # The parameters, which are there, are counted already.
    process = 0 if workers.device.type == "cuda" else max(resident_memory() - parameters, 0)
    images = data.standardise(data.train.images[:_TRIED], getattr(torch, config.train.dtype))
    kept = 0
    trial = _copy(model)
    if trial is not None:
        with torch.random.fork_rng(devices=[]):
            kept = _kept(trial, images, data.train.labels[:_TRIED], data.num_classes)
    return Need(process, fixed, kept // len(images), _most_samples(config, workers.world_size))


def _copy(model: nn.Module) -> nn.Module | None:
    """A copy of the model whose layers exchange nothing, so that a trial leaves no trace; None if
    it has none.
    """
    try:
        trial = copy.deepcopy(model)
    except Exception as error:  # whatever the parts of a user's model do
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


def _kept(model: nn.Module, images: Tensor, labels: Tensor, num_classes: int) -> int:
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


def _check_logits(logits: object, count: int, num_classes: int) -> None:
    """Refuse what the loss would take for something else, or would stumble over."""
    got = types_of(logits)
    if isinstance(logits, Tensor):
        # A pretrained head may have more classes.
        if logits.ndim == 2 and len(logits) == count and logits.shape[1] >= num_classes:
            return
        got = f"shape {tuple(logits.shape)}"
    raise ConfigError(
        "`model.name` must give a model from images (N, C, H, W) to a tensor of logits (N, "
        f"num_classes), got {got} "
        f"for {count} images of {num_classes} classes. Wrap a model that returns something else."
    )


def _copies(config: Config) -> int:
    """How many numbers the optimizer and the average keep for each parameter."""
    probe = torch.zeros(8, 8, requires_grad=True)
    probe.grad = torch.ones(8, 8)
    options = {
        name: tuple(v) if isinstance(v, list) else v
        for name, v in config.train.optimizer.options.items()
    }
    optimizer = optim.OPTIMIZERS[config.train.optimizer.name]([probe], lr=0.0, **options)  # pyright: ignore[reportCallIssue]
    optimizer.step()
    kept = sum(
        v.numel()
        for state in optimizer.state.values()
        for v in state.values()
        if isinstance(v, Tensor)
    )
    return round(kept / probe.numel()) + (config.train.ema is not None)


def _most_samples(config: Config, world_size: int) -> int:
    count, micro_batch = config.train.global_batch, config.launch.micro_batch
    if config.norm.sync == "batch":
        first = place(count, config.norm_batch, 0, world_size, micro_batch)
    else:
        first = place_local(count, 0, world_size, micro_batch)
    return max(sum(part.stop - part.start for part in parts) for parts in first.rounds)


def free_for(config: Config, workers: Workers, started: int) -> float:
    """What this worker may use, in bytes; on a CPU with what it has already.

    Args:
        config: which may say.
        workers: this worker's place.
        started: how many workers of this machine have their memory, as this one has.
    """
    if config.launch.memory_gib is not None:
        return config.launch.memory_gib * GIB
    if workers.device.type == "cuda":
        return torch.cuda.mem_get_info(workers.device)[0]
    return (free_memory() + started * resident_memory()) / workers.local_world_size


def resident_memory() -> int:
    """What this process has of the machine's memory, in bytes; 0 where nobody says."""
    try:
        return (
            int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            * resource.getpagesize()
        )
    except (OSError, ValueError):
        return 0


def free_memory() -> float:
    """Free memory of this machine, or what its control group leaves of it, in bytes; infinite where
    nobody says.
    """
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
