"""Whether a worker's part of a step fits in its memory, before it is tried.

    need = parameters * (value + gradient + what optimizer and average keep) + samples in a forward * bytes per sample

Bytes per sample are those that a forward of a few samples leaves for its backward pass.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from syncnorm.errors import ConfigError
from syncnorm.train import optim
from syncnorm.train.config import Config
from syncnorm.train.config_norm import NormSection
from syncnorm.train.data import Dataset
from syncnorm.train.learner import make_bare_model
from syncnorm.train.placement import place, place_local
from syncnorm.train.workers import Workers

_GIB = 2**30
_TRIED = 4


@dataclass(frozen=True)
class Need:
    """What a step of a worker needs, in bytes.

    Args:
        fixed: parameters, gradients, and what optimizer and moving average keep.
        per_sample: what a forward leaves for its backward pass, for each sample.
        samples: in the largest forward of any worker.
    """

    fixed: int
    per_sample: int
    samples: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.fixed + self.per_sample * self.samples

    def __str__(self) -> str:
        return (
            f"{in_words(self.total)}: {in_words(self.fixed)} for parameters, gradients and optimizer, and "
            f"{self.samples} samples in a forward of {in_words(self.per_sample)} each"
        )


def in_words(count: float) -> str:
    """A number of bytes, for people."""
    return f"{count / _GIB:.2f} GiB" if count >= _GIB else f"{count / 2**20:.2f} MiB"


def check_memory(config: Config, workers: Workers, data: Dataset, allowed: tuple[str, ...] = ()) -> None:
    """Refuse a step that does not fit.

    *Collectives*: one gathering of what each worker has; every worker must call.

    Raises:
        ConfigError: with the figures; on all workers, if one has too little.
    """
    need = estimate(config, workers.world_size, data, allowed)
    free: list[float] = [0.0] * workers.world_size
    dist.all_gather_object(free, free_for(config, workers))
    poorest = min(range(workers.world_size), key=lambda rank: free[rank])
    refuse(need, free[poorest], poorest)


def refuse(need: Need, free: float, rank: int) -> None:
    """ConfigError unless a step fits into `free` bytes of worker `rank`."""
    if need.total <= free:
        return
    fitting = int((free - need.fixed) // max(need.per_sample, 1))
    remedy = (
        f"Set launch.micro_batch to at most {fitting}, or take more workers."
        if fitting > 0
        else "Take a smaller model or more memory."
    )
    raise ConfigError(
        f"`launch.micro_batch` must be such that a step fits into memory, got one that needs {need}. "
        f"Worker {rank} has {in_words(free)}. {remedy}"
    )


def estimate(config: Config, world_size: int, data: Dataset, allowed: tuple[str, ...] = ()) -> Need:
    """What a step of the busiest worker needs. No exchange, and random numbers stay as they are."""
    # torch's own layer keeps what ours keep, and takes a batch that is not a step's.
    plain = config.model_copy(update={"norm": NormSection(name="batch_norm", sync="none", rules={})})
    with torch.random.fork_rng(devices=[]):
        model = make_bare_model(plain, data, 1, allowed)
        images = data.standardise(data.train.images[:_TRIED], getattr(torch, config.train.dtype))
        kept = _kept(model, images, data.train.labels[:_TRIED])
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    fixed = parameters * (2 + _copies(config))
    return Need(fixed, kept // max(len(images), 1), _most_samples(config, world_size))


def _kept(model: nn.Module, images: Tensor, labels: Tensor) -> int:
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
        loss = F.cross_entropy(model(images), labels, reduction="sum")
        del loss
    return sum(seen.values())


def _copies(config: Config) -> int:
    """How many numbers the optimizer and the average keep for each parameter."""
    probe = torch.zeros(8, 8, requires_grad=True)
    probe.grad = torch.ones(8, 8)
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in config.train.optimizer.options.items()}
    optimizer = optim.OPTIMIZERS[config.train.optimizer.name]([probe], lr=0.0, **options)  # pyright: ignore[reportCallIssue]
    optimizer.step()
    kept = sum(v.numel() for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    return round(kept / probe.numel()) + (config.train.ema is not None)


def _most_samples(config: Config, world_size: int) -> int:
    count, micro_batch = config.train.global_batch, config.launch.micro_batch
    if config.norm.sync == "batch":
        first = place(count, config.norm_batch, 0, world_size, micro_batch)
    else:
        first = place_local(count, 0, world_size, micro_batch)
    return max(sum(part.stop - part.start for part in parts) for parts in first.rounds)


def free_for(config: Config, workers: Workers) -> float:
    """What this worker may use, in bytes."""
    if config.launch.memory_gib is not None:
        return config.launch.memory_gib * _GIB
    if workers.device.type == "cuda":
        return torch.cuda.mem_get_info(workers.device)[0]
    return free_memory() / workers.local_world_size


def free_memory() -> float:
    """Free memory of this machine, or what its control group leaves of it, in bytes; infinite where nobody says."""
    limits = [float("inf")]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        bound = (group / "memory.max").read_text(encoding="ascii").strip()
        if bound.isdecimal():
            limits.append(int(bound) - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass
    return min(limits)
