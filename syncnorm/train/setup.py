"""The training setup, built from a configuration: data, model, optimizer, schedule.

A `Setup` is all that a step works on; `make_setup` builds it, alike on all workers.
"""

import inspect
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import LRScheduler

from syncnorm import prepare_ddp, rng
from syncnorm.comm import exchange, groups
from syncnorm.errors import ConfigError, ExchangeError
from syncnorm.family.layer import Pooling
from syncnorm.model.convert.others import family_of, listed
from syncnorm.model.modes import begin_training
from syncnorm.module import SyncNorm
from syncnorm.placement import Placement
from syncnorm.statistics.grouped import StatisticGroups
from syncnorm.train import optim
from syncnorm.train.average import MovingAverage
from syncnorm.train.buffers import SharedBuffers
from syncnorm.train.build_model import build_model
from syncnorm.train.config.callables import call
from syncnorm.train.config.schema import Config
from syncnorm.train.data.builtin import DATASETS
from syncnorm.train.data.datasets import Dataset, types_of
from syncnorm.train.data.feed import (
    TRAIN,
    VALIDATION,
    Feed,
    LoaderFeed,
    MemoryFeed,
    judged_split,
    labels_checksum,
)
from syncnorm.train.data.inputs import Signature
from syncnorm.train.data.regimes import check_regime
from syncnorm.train.data.sources import SOURCES
from syncnorm.train.data.splits import Splits
from syncnorm.train.efficiency import make_efficient, set_tf32
from syncnorm.train.norm import (
    Spectral,
    apply_rules,
    fit_layers,
    make_norm_layer,
    reparametrize,
    spectral_norms,
    warn_of_no_pooling,
)
from syncnorm.train.parameters import freeze, parameter_groups
from syncnorm.train.scaling import make_scaler
from syncnorm.train.task import Task
from syncnorm.train.task.make import make_task
from syncnorm.train.unused import Gradients
from syncnorm.train.workers import Workers, place_step

_log = logging.getLogger(__name__)

_MOST_TERMS = 16


@dataclass(frozen=True)
class Setup:
    """The model under training, and all that changes it.

    Args:
        config: the configuration it was built from.
        workers: this worker's rank and device.
        task: the loss and the metrics.
        model: the bare network, whose state is saved.
        ddp: the same network in training: under DistributedDataParallel, perhaps compiled.
        gradients: that DDP sums, some of which may be missing.
        optimizer: over the network's parameters.
        schedule: of the learning rate.
        scaler: of the loss, with float16; else it does nothing.
        average: moving average of the network, if the configuration asks for one.
        layers: the network's layers that are syncnorm's.
        statistic_groups: the source of their statistics, where a step has several of each layer.
        shared_buffers: buffers that are neither a batch norm's nor each worker's own.
        signature: the inputs and outputs of the network.
        samples: in the training set.
        labels_checksum: of the training set; None if they are not known before they are read.
    """

    config: Config
    workers: Workers
    task: Task
    model: nn.Module
    ddp: DistributedDataParallel
    gradients: Gradients
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    average: MovingAverage | None
    layers: list[SyncNorm | Pooling]
    statistic_groups: StatisticGroups | None
    shared_buffers: SharedBuffers
    signature: Signature
    samples: int
    labels_checksum: int | None

    @property
    def evaluated_model(self) -> nn.Module:
        """The network that is evaluated: the moving average, if there is one."""
        return self.model if self.average is None else self.average.module

    @cached_property
    def spectral_norms(self) -> list[Spectral]:
        """The network's spectral norms."""
        return spectral_norms(self.model)

    @cached_property
    def before_the_last_linear(self) -> list[nn.Parameter]:
        """The parameters but those of the last linear layer."""
        linear = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        last = set(linear[-1].parameters()) if linear else set()
        return [p for p in self.model.parameters() if p not in last]

    def placement(self, count: int) -> Placement:
        """Place a step of `count` samples: this worker's forwards, and who shares a statistic."""
        rank, world_size = self.workers.rank, self.workers.world_size
        return place_step(self.config, count, rank, world_size, has_layers=bool(self.layers))

    def forwards(self, indices: Tensor) -> list[Tensor]:
        """List the indices of each of this worker's forwards in a step over `indices`, (N,)."""
        rounds = self.placement(len(indices)).rounds
        taken = [[indices[part] for part in parts] for parts in rounds]
        return [torch.cat(some) if len(some) > 1 else some[0] for some in taken]

    def set_norm_batches(self, placement: Placement, parts: tuple[slice, ...]) -> None:
        """Tell the layers over which samples the next forward's statistics are taken."""
        if self.statistic_groups is not None:
            over = groups.statistics_group(placement.shared_by)
            self.statistic_groups.place(over, [p.stop - p.start for p in parts])

    def autocast(self) -> AbstractContextManager[Any]:
        """Make the context of a forward, with automatic mixed precision if it is asked for."""
        return autocast(self.config, self.workers.device)

    def update_average(self) -> None:
        """Move the moving average, if there is one, towards the model."""
        if self.average is not None:
            self.flush_statistics()
            self.shared_buffers.resize_average()
            self.average.update_parameters(self.model)
            self.shared_buffers.copy_exact_to_average()

    def flush_statistics(self) -> None:
        """Bring all running statistics up to date. Starts no exchange.

        Raises:
            ExchangeError: the last update broke. A checkpoint without it would be one of another
                run.
        """
        for layer in self.layers:
            layer.settle()
            if isinstance(layer.failure, ExchangeError):
                raise layer.failure

    def copy_buffers(self) -> list[Tensor]:
        """Copy the model's buffers, for `restore_buffers`."""
        self.flush_statistics()
        return [buffer.clone() for buffer in self.model.buffers()]

    @torch.no_grad()
    def restore_buffers(self, copies: list[Tensor]) -> None:
        """Undo what has changed the buffers since `copy_buffers`."""
        self.flush_statistics()
        for buffer, value in zip(self.model.buffers(), copies, strict=True):
            if buffer.shape == value.shape:
                buffer.copy_(value)
            else:
                buffer.data = value

    def describe_step(self) -> str:
        """Describe the placement of a whole step, in a line."""
        count, workers = self.config.train.global_batch, self.workers
        placement = self.placement(count)
        forwards = [
            " + ".join(str(part.stop - part.start) for part in parts) for parts in placement.rounds
        ]
        return (
            f"{count} samples on {workers.world_size} worker(s); worker {workers.rank} has "
            f"{len(forwards)} forward(s), of {'; '.join(forwards)} samples; each statistic is "
            f"shared by {placement.shared_by} worker(s)"
        )


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """Make the context of a forward, with automatic mixed precision if it is asked for."""
    if config.train.autocast is None:
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, config.train.autocast))


def load_feed(config: Config, device: torch.device, allowed: tuple[str, ...] = ()) -> Feed:
    """Open the data set.

    Raises:
        ConfigError: a file is missing or damaged, a callable may not be called or returns something
            else, or there is no validation set where one is needed.
    """
    data = _load_data(config, allowed).hold_out(config.data.validation)
    feed: Feed
    if isinstance(data, Dataset):
        feed = MemoryFeed(data, config, device)
    else:
        feed = LoaderFeed(data, config, device)
    check_regime(config, feed)
    if config.train.global_batch > feed.sizes[TRAIN]:
        _log.warning(
            "train.global_batch is %d, and the training set has %d samples: each epoch is one step "
            "of them all",
            config.train.global_batch,
            feed.sizes[TRAIN],
        )
    if judged_split(feed) != VALIDATION:
        _refuse_to_choose(
            config,
            "there is no validation set: the test set chooses nothing. Set data.validation to a "
            "share of the training set",
        )
    return feed


def _refuse_to_choose(config: Config, why: str) -> None:
    """Raise ConfigError if a key asks for what is chosen by the deciding metric on a validation set."""
    for key, is_asked in (
        ("checkpoint.best", config.checkpoint.best),
        ("train.patience", config.train.patience),
    ):
        if is_asked:
            raise ConfigError(f"`{key}` must be left out where {why}.")


def _load_data(config: Config, allowed: tuple[str, ...]) -> Dataset | Splits:
    root = None if config.data.root is None else Path(config.data.root)
    if config.data.name in DATASETS:
        return DATASETS[config.data.name](root)
    if config.data.name in SOURCES:
        return SOURCES[config.data.name](root, **config.data.options)
    made = call("data", config.data.name, allowed, root, **config.data.options)
    if not isinstance(made, Dataset | Splits):
        raise ConfigError(
            "`data.name` must return a syncnorm.train.data.splits.Splits(train, test, "
            "num_classes=..., in_channels=...) of data sets, or a "
            f"syncnorm.train.data.datasets.Dataset of images in memory, got {types_of(made)} of "
            f"{config.data.name!r}. make_dataset(train, test, num_classes) there makes one of two "
            "Split(images, labels)."
        )
    return made.check()


def make_bare_model(
    config: Config,
    device: torch.device,
    data: Feed,
    total_steps: int,
    allowed: tuple[str, ...] = (),
) -> nn.Module:
    """Build the model for data of this shape. No exchange.

    Each change to a model of the user's is logged in a line.

    Raises:
        ConfigError: all samples are of one class.
    """
    classes = data.signature.classes
    if config.task.name == "classify" and data.signature.num_classes == 1:
        raise ConfigError(
            "`data` must have several classes for task classify, got one"
            f"{f', {classes[0]!r}' if classes else ''}: there is nothing to tell apart. Classes of "
            "a folder are the folders right in it."
        )
    model = make_network(config, data.signature, total_steps, allowed)
    _check_trainable(model)
    if begin_training(model):
        _log.warning("the model came in evaluation mode as a whole: it is put into training mode")
    freeze(model, config.train.freeze)
    warn_of_no_pooling(model, config.norm)
    make_efficient(model, config.train)
    # Drawn in float32 whatever the dtype, so that a float64 run starts from the same weights.
    return model.to(device, getattr(torch, config.train.dtype))


def _check_trainable(model: nn.Module) -> None:
    """Refuse what cannot be brought to `train.dtype`, or has no shape yet.

    Raises:
        ConfigError: the model has it.
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise ConfigError(
                f"`model.name` must give a model whose parameters have their shapes, got a lazy "
                f"one, {name!r}. Run a sample through it where you make it."
            )
        if tensor.is_complex():
            raise ConfigError(
                f"`model.name` must give a model of real numbers, which train.dtype says, got "
                f"{name!r} of {tensor.dtype}. Keep its two parts: torch.view_as_real."
            )


def make_network(
    config: Config, signature: Signature, total_steps: int, allowed: tuple[str, ...]
) -> nn.Module:
    """Build the network that `model` names, with the layers that `norm` names, on the CPU."""
    rng.seed_all(config.train.seed)
    model = build_model(
        config.model.name,
        config.model.options,
        allowed,
        in_channels=signature.in_channels,
        num_classes=signature.num_classes,
        norm_layer=make_norm_layer(config.norm, total_steps),
    )
    fit_layers(model, config.norm, total_steps)
    apply_rules(model, config.norm, total_steps)
    reparametrize(model, config.norm.weights)
    return model


def task_of(
    config: Config, device: torch.device, feed: Feed, allowed: tuple[str, ...] = ()
) -> Task:
    """Build the task of a run."""
    dtype = getattr(torch, config.train.dtype)
    return make_task(config.task, device, dtype, feed.signature.num_classes, allowed)


def check_decides(config: Config, task: Task) -> None:
    """Refuse a new run in which something is to be chosen, and no metric decides.

    Not one that has begun, which could not go on without what it was begun with.

    Raises:
        ConfigError: `checkpoint.best` or `train.patience` is set, and the task has no `best`.
    """
    if not task.best:
        _refuse_to_choose(
            config, "no metric decides: the task's `best` is empty. Name one by task.best"
        )


def make_setup(
    config: Config, workers: Workers, feed: Feed, total_steps: int, model: nn.Module, task: Task
) -> Setup:
    """Build all that a step works on around a model and a task; alike on all workers.

    *Collectives*: those of prepare_ddp and DistributedDataParallel; every worker must call.

    Args:
        config: what to build.
        workers: this worker's rank and device.
        feed: of the data; nothing is read.
        total_steps: length of the run.
        model: of `make_bare_model`.
        task: of `task_of`.
    """
    train = config.train
    set_tf32(train.tf32)
    model = prepare_ddp(model)
    # Whoever sends other counts of a loss's terms than the rest is an error, and no hang.
    exchange.make_room(groups.statistics_group(), _MOST_TERMS)
    statistic_groups = _attach_statistic_groups(config, model)
    average = None
    if train.ema is not None:
        average = MovingAverage(model, train.ema)
        if family := family_of(model):
            _log.warning(
                "the moving average keeps averages of the statistics of %s, and gets none of its "
                "own for them",
                listed(family),
            )
    if train.compile:
        model.compile()
    # Gradients in DDP's buckets need no copy of the sums.
    ddp = DistributedDataParallel(model, **_no_buffer_broadcast(), gradient_as_bucket_view=True)
    gradients = Gradients(ddp)
    optimizer = optim.make_optimizer(
        train.optimizer.name, parameter_groups(model, train), train.lr, train.optimizer.options
    )
    schedule = optim.make_schedule(
        train.schedule.name, optimizer, train.schedule.warmup, total_steps, train.schedule.options
    )
    _warn_of_dropout(model)
    return Setup(
        config,
        workers,
        task,
        model,
        ddp,
        gradients,
        optimizer,
        schedule,
        make_scaler(train.autocast, workers),
        average,
        layers=our_layers(model),
        statistic_groups=statistic_groups,
        shared_buffers=SharedBuffers(model, None if average is None else average.module),
        signature=feed.signature,
        samples=feed.sizes[TRAIN],
        labels_checksum=labels_checksum(feed),
    )


def _no_buffer_broadcast() -> dict[str, Any]:
    # Buffers are equal by construction, each worker's own, or sent after each step.
    parameters = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    return {name: False}


def our_layers(model: nn.Module) -> list[SyncNorm | Pooling]:
    """List the layers of a network that are syncnorm's."""
    return [module for module in model.modules() if isinstance(module, SyncNorm | Pooling)]


def _attach_statistic_groups(config: Config, model: nn.Module) -> StatisticGroups | None:
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, SyncNorm)
    }
    if not config.is_grouped or not layers:
        return None
    statistic_groups = StatisticGroups(layers)
    statistic_groups.steps.attach(model)
    return statistic_groups


def active_dropout(model: nn.Module) -> list[str]:
    """Names of the layers of dropout that drop something."""
    return [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0
    ]


def _warn_of_dropout(model: nn.Module) -> None:
    if active := active_dropout(model):
        _log.warning(
            "dropout at %s: its noise depends on the number of workers, and so does the run",
            ", ".join(active),
        )


def step_seed(seed: int, step: int, rank: int) -> int:
    """Mix the seed of a step's random numbers on a worker; earlier draws have no part in it."""
    mixed = seed
    for number in (step, rank):
        mixed = (mixed * 6364136223846793005 + 1442695040888963407 + number) % 2**63
    return mixed
