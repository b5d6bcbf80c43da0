"""What a configuration describes, built: the data, the model and what changes it."""

import inspect
import logging
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from syncnorm import prepare_ddp
from syncnorm.comm import groups
from syncnorm.errors import ConfigError
from syncnorm.model.modes import begin_training
from syncnorm.module import SyncNorm
from syncnorm.statistics.grouped import StatisticGroups
from syncnorm.train import optim
from syncnorm.train.buffers import SharedBuffers
from syncnorm.train.compiler import compiler_put_off, without_compiler
from syncnorm.train.config.callables import resolve
from syncnorm.train.config.schema import REFERENCE, Config
from syncnorm.train.data.datasets import DATASETS, Dataset, checked_splits, types_of
from syncnorm.train.models import MODELS
from syncnorm.train.norm import apply_rules, fit_layers, make_norm_layer
from syncnorm.train.placement import Placement, place, place_local
from syncnorm.train.workers import Workers

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Learner:
    """The model and what changes it.

    Args:
        config: what it was built from.
        workers: where this worker stands.
        model: the bare network, whose state is saved and which is evaluated.
        ddp: the network in training: perhaps compiled, and under DistributedDataParallel.
        optimizer: over its parameters.
        schedule: of the learning rate.
        average: the moving average of the network, if the configuration asks for one.
        layers: ours.
        statistics: of our layers, where a step has several.
        shared: buffers that are neither batch norms' nor each worker's own.
    """

    config: Config
    workers: Workers
    model: nn.Module
    ddp: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    average: AveragedModel | None
    layers: list[SyncNorm]
    statistics: StatisticGroups | None
    shared: SharedBuffers

    @property
    def judged(self) -> nn.Module:
        """What is evaluated."""
        return self.model if self.average is None else self.average.module

    def place(self, count: int) -> Placement:
        """Where a step of `count` samples is computed."""
        rank, world_size, micro_batch = (
            self.workers.rank,
            self.workers.world_size,
            self.config.launch.micro_batch,
        )
        if self.config.norm.sync != "batch" or not self.layers:
            return place_local(count, rank, world_size, micro_batch)
        return place(count, self.config.norm_batch, rank, world_size, micro_batch)

    def describe_step(self) -> str:
        """Say where a whole step is computed."""
        count, workers = self.config.train.global_batch, self.workers
        placement = self.place(count)
        forwards = [
            " + ".join(str(part.stop - part.start) for part in parts) for parts in placement.rounds
        ]
        return (
            f"{count} samples on {workers.world_size} worker(s); worker {workers.rank} has "
            f"{len(forwards)} forward(s), "
            f"of {'; '.join(forwards)} samples; each statistic is shared by {placement.shared_by} "
            "worker(s)"
        )

    def announce(self, placement: Placement, parts: tuple[slice, ...]) -> None:
        """Tell the layers what the statistics of the next forward are taken over."""
        if self.statistics is not None:
            over = groups.statistics_group(placement.shared_by)
            self.statistics.place(over, [p.stop - p.start for p in parts])

    def settle(self) -> None:
        """Bring all running statistics up to date. Starts no exchange."""
        for layer in self.layers:
            layer.statistics.settle()

    def buffers(self) -> list[Tensor]:
        """Copies of the model's buffers, to be put back."""
        self.settle()
        return [buffer.clone() for buffer in self.model.buffers()]

    @torch.no_grad()
    def put_back(self, buffers: list[Tensor]) -> None:
        """Undo what has changed the buffers since."""
        self.settle()
        for buffer, value in zip(self.model.buffers(), buffers, strict=True):
            if buffer.shape == value.shape:
                buffer.copy_(value)
            else:
                buffer.data = value

    def follow(self) -> None:
        """Move the moving average, if there is one, towards the model."""
        if self.average is not None:
            self.settle()
            self.shared.before_average()
            self.average.update_parameters(self.model)
            self.shared.after_average()

    def precision(self) -> AbstractContextManager[Any]:
        """The context of a forward."""
        if self.config.train.autocast is None:
            return nullcontext()
        return torch.autocast(self.workers.device.type, getattr(torch, self.config.train.autocast))


def load_data(config: Config, device: torch.device, allowed: tuple[str, ...] = ()) -> Dataset:
    """Load the whole data set onto this worker's device.

    Raises:
        ConfigError: a file is missing or damaged, or a callable may not be called or returns
            something else.
    """
    root = None if config.data.root is None else Path(config.data.root)
    if not REFERENCE.fullmatch(config.data.name):
        return DATASETS[config.data.name](root).to(device)
    made = resolve(config.data.name, allowed, "data.name")(root, **config.data.options)
    if not isinstance(made, Dataset):
        raise ConfigError(
            f"`data.name` must return a syncnorm.train.data.datasets.Dataset, got {types_of(made)} of "
            f"{config.data.name!r}. "
            "make_dataset(train, test, num_classes) there makes one of two Split(images, labels)."
        )
    train, test = checked_splits(made.train, made.test, made.num_classes)
    return replace(made, train=train, test=test).to(device)


def make_model(
    config: Config, data: Dataset, total_steps: int, allowed: tuple[str, ...] = ()
) -> nn.Module:
    """Build the model for data of this shape, ready for DDP."""
    return prepare_ddp(make_bare_model(config, data, total_steps, allowed))


def make_bare_model(
    config: Config, data: Dataset, total_steps: int, allowed: tuple[str, ...] = ()
) -> nn.Module:
    """Build the model for data of this shape.

    No exchange. What is changed in it is said in a line each.
    """
    seed_random(config.train.seed)
    build = MODELS.get(config.model.name) or resolve(config.model.name, allowed, "model.name")
    images = data.train.images
    model = build(
        in_channels=images.shape[1],
        num_classes=data.num_classes,
        norm_layer=make_norm_layer(config.norm, total_steps),
        **config.model.options,
    )
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"`model.name` must return a torch.nn.Module, got {types_of(model)} of "
            f"{config.model.name!r}."
        )
    fit_layers(model, config.norm, total_steps)
    apply_rules(model, config.norm, total_steps)
    if begin_training(model):
        _log.warning("the model came in evaluation mode as a whole: it is put into training mode")
    # Drawn in float32 whatever the dtype, so that a float64 run starts from the same weights.
    return model.to(images.device, getattr(torch, config.train.dtype))


def make_learner(
    config: Config,
    workers: Workers,
    data: Dataset,
    total_steps: int,
    allowed: tuple[str, ...] = (),
    model: nn.Module | None = None,
) -> Learner:
    """Build model, optimizer and schedule; alike on all workers, as all draw from the same seed.

    *Collectives*: those of prepare_ddp and DistributedDataParallel; every worker must call.

    Args:
        config: what to build.
        workers: this worker's place.
        data: for its shape.
        total_steps: length of the run.
        allowed: packages whose callables a configuration may name.
        model: of `make_bare_model`, where it has been built already.
    """
    train = config.train
    if model is None:
        model = make_bare_model(config, data, total_steps, allowed)
    model = prepare_ddp(model)
    statistics = _group_statistics(config, model)
    average = None
    if train.ema is not None:
        average = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(train.ema), use_buffers=True
        )
    if train.compile:
        model.compile()
    with compiler_put_off():
        ddp = without_compiler(DistributedDataParallel)(
            model,
            **_no_buffers(),
            # A parameter without a part in the loss is left alone, as in a single process; without this
            # DDP fails. Nor does it then arrange its buckets anew after the first step: with more than
            # two workers a sum depends on the arrangement, and a resumed run would differ in the last
            # bit.
            find_unused_parameters=True,
        )
    optimizer = optim.make_optimizer(train.optimizer.name, model, train.lr, train.optimizer.options)
    schedule = optim.make_schedule(
        train.schedule.name, optimizer, train.schedule.warmup, total_steps, train.schedule.options
    )
    _warn_of_noise(model)
    layers = [module for module in model.modules() if isinstance(module, SyncNorm)]
    shared = SharedBuffers(model, None if average is None else average.module)
    return Learner(
        config, workers, model, ddp, optimizer, schedule, average, layers, statistics, shared
    )


def _no_buffers() -> dict[str, Any]:
    """Buffers are equal by construction, each worker's own, or sent after each step: DDP need not
    send them.
    """
    parameters = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    return {name: False}


def _group_statistics(config: Config, model: nn.Module) -> StatisticGroups | None:
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, SyncNorm)
    }
    if not config.is_grouped or not layers:
        return None
    statistics = StatisticGroups(layers)
    statistics.attach(model)
    return statistics


def _warn_of_noise(model: nn.Module) -> None:
    noisy = [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0
    ]
    if noisy:
        _log.warning(
            "dropout at %s: its noise depends on the number of workers, and so does the run",
            ", ".join(noisy),
        )


def noise_seed(seed: int, step: int, rank: int) -> int:
    """What the random numbers of a step's forward on a worker are drawn from: never on what came
    before.
    """
    mixed = seed
    for number in (step, rank):
        mixed = (mixed * 6364136223846793005 + 1442695040888963407 + number) % 2**63
    return mixed


def seed_random(seed: int) -> None:
    """Seed torch's random numbers and Python's: a callable of the configuration's may draw from
    either.
    """
    torch.manual_seed(seed)
    random.seed(seed)


def indices_of(batch: Tensor, parts: tuple[slice, ...]) -> Tensor:
    """The samples of a forward."""
    return batch[parts[0]] if len(parts) == 1 else torch.cat([batch[part] for part in parts])
