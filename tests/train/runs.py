"""Functions that a pool's ranks call: they must be importable."""

import logging
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm import SyncBatchNorm, prepare_ddp, scale_loss
from syncnorm.comm import exchange, shared
from syncnorm.errors import CheckpointError, ConfigError, ExchangeError
from syncnorm.model.modes import in_evaluation
from syncnorm.placement import shard
from syncnorm.train import optim
from syncnorm.train.buffers import gather_digests
from syncnorm.train.checkpoint.capture import Progress
from syncnorm.train.config.file import load_config
from syncnorm.train.config.schema import Config
from syncnorm.train.data.batches import ReadFailure
from syncnorm.train.data.builtin import digits
from syncnorm.train.data.datasets import Dataset, Split
from syncnorm.train.data.feed import TEST, TRAIN, Feed, MemoryFeed
from syncnorm.train.data.inputs import Standardise
from syncnorm.train.diagnose import first_step
from syncnorm.train.loop import Outcome, train
from syncnorm.train.metrics import read_events
from syncnorm.train.parameters import parameter_groups
from syncnorm.train.setup import Setup, make_bare_model, make_setup, task_of
from syncnorm.train.step import StepBatch, StepResult, evaluate, training_step
from syncnorm.train.step_notes import Flags
from syncnorm.train.task.supervised import Classify
from syncnorm.train.weights import load_weights
from syncnorm.train.workers import Workers
from tests.train import nets


class Free:
    """A watch that asks for a stop at a step, if at all.

    Args:
        stop_at: the step of the run before which this worker is asked.
        progress: of the run.
    """

    def __init__(self, stop_at: int | None = None, progress: Progress | None = None) -> None:
        self._stop_at = stop_at
        self._progress = progress

    def alive(self) -> None:
        pass

    @property
    def stop(self) -> str | None:
        is_time = (
            self._stop_at is not None
            and self._progress is not None
            and self._progress.step + 1 >= self._stop_at
        )
        return "SIGTERM" if is_time else None


def workers() -> Workers:
    return Workers(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def train_digits(
    folder: str, overrides: list[str], stop_at: int | None = None, stopped_rank: int = 0
) -> tuple[Outcome, Progress]:
    """Train as configs/digits.yaml says, but for `overrides`; one rank may be asked to stop."""
    Path(folder).mkdir(exist_ok=True)
    progress = Progress()
    watch = Free(stop_at if dist.get_rank() == stopped_rank else None, progress)
    return train(
        load_config("digits", overrides), workers(), Path(folder), progress, watch, ("tests",)
    ), progress


def train_bad_image(folder: str, changes: dict[str, dict[str, Any]]) -> tuple[Outcome, Progress]:
    """Train on digits of which one image makes the network's output NaN."""
    sections: dict[str, Any] = {
        "model": {"name": "tests.train.nets:Breaks", "options": {"limit": 100.0}},
        "data": {"name": "tests.train.nets:one_bad_image", "options": {"bad": 1000}},
        "train": {"epochs": 1, "global_batch": 128, "lr": 0.1, **changes.get("train", {})},
        "norm": changes.get("norm", {}),
    }
    progress = Progress()
    return train(
        Config(**sections), workers(), Path(folder), progress, Free(), ("tests",)
    ), progress


def refused_in(folder: str, overrides: list[str]) -> str:
    """The message with which training in a folder that is used already is refused."""
    try:
        train_digits(folder, overrides)
    except (CheckpointError, ConfigError) as error:
        return str(error)
    raise AssertionError("it has trained")


def train_code(folder: str, model: str, changes: list[str]) -> tuple[Outcome, int]:
    """Train a network of `tests.train.nets` on digits; also how often `own_norms` was called."""
    built = nets.BUILT
    config = load_config(
        "digits", ["train.epochs=1", f"model.name=tests.train.nets:{model}", *changes]
    )
    outcome = train(config, workers(), Path(folder), Progress(), Free(), ("tests",))
    return outcome, nets.BUILT - built


def refused(overrides: list[str]) -> str:
    """Return the error of `train`, which must refuse a configuration before the first step."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(
                load_config("digits", overrides),
                workers(),
                Path(folder),
                Progress(),
                Free(),
                ("tests",),
            )
        except ConfigError as error:
            assert not list(Path(folder).iterdir())
            return str(error)
    raise AssertionError("it has trained")


def begun_with(overrides: list[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Build the model of digits and load its weights; return its state and what was said."""
    said = Said()
    logging.getLogger().addHandler(said)
    try:
        config = load_config("digits", overrides)
        model = make_bare_model(config, torch.device("cpu"), feed_of(digits(None), config), 1)
        load_weights(model, config.model, workers())
    finally:
        logging.getLogger().removeHandler(said)
    return model.state_dict(), said.lines


def said_by_train(folder: str, overrides: list[str]) -> tuple[str, list[str]]:
    """Train as `train_digits` does; return the error, if there is one, and what was said."""
    said, text = Said(), ""
    logging.getLogger().addHandler(said)
    try:
        train_digits(folder, overrides)
    except ConfigError as error:
        text = str(error)
    finally:
        logging.getLogger().removeHandler(said)
    return text, said.lines


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Read the run's metrics of one kind."""
    return [event for event in read_events(folder / "metrics.jsonl")[0] if event["event"] == kind]


class Merging(nn.Module):
    """Has two states, as adapters merged into the weights for evaluation; `train` chooses."""

    is_merged = False

    def train(self, mode: bool = True):
        self.is_merged = not mode
        return super().train(mode)


class Sign(nn.Module):
    """Predicts class 1 for positive numbers, class 0 for others; fails in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Sequential(nn.Dropout(), nn.Dropout()).eval()
        self.frozen[1].train()
        self.merging = Merging()

    def forward(self, x):
        assert not any(module.training for module in self.modules())
        assert self.merging.is_merged
        positive = (x.flatten(1).sum(1) > 0).long()
        return nn.functional.one_hot(positive, 2).double()


def dataset_of(train: Split, test: Split, num_classes: int) -> Dataset:
    """A data set whose pixels are as they should be."""
    channels = train.images.shape[1]
    zeros, ones = (
        torch.zeros(channels, dtype=torch.float64),
        torch.ones(channels, dtype=torch.float64),
    )
    return Dataset(train, test, num_classes, zeros, ones)


def evaluate_sign(
    numbers: list[float], labels: list[int], chunk: int
) -> tuple[dict[str, float], list[str], bool]:
    """Evaluate `Sign` on this rank's shard of `numbers`."""
    split = Split(torch.tensor(numbers).reshape(-1, 1, 1, 1), torch.tensor(labels))
    config = load_config("digits", [f"train.global_batch={chunk}", "train.norm_batch=null"])
    feed = feed_of(dataset_of(split, split, 2), config)
    model = Sign()
    metrics = evaluate(Classify(), model, feed, TEST, config, workers())
    return metrics, in_evaluation(model), model.merging.is_merged


class OneUnreadable(MemoryFeed):
    """The second batch of rank 1 cannot be read; after it none can."""

    def batches(self, split: str, forwards: Any, epoch: int = 0) -> Any:
        for number, batch in enumerate(super().batches(split, forwards, epoch)):
            if dist.get_rank() != 1 or number < 1:
                yield batch
                continue
            while True:
                yield ReadFailure("unreadable", self.load(split, torch.zeros(0, dtype=torch.long)))


def evaluate_unreadable(statistics: str) -> tuple[str, int]:
    """Evaluate where rank 1 cannot read; the error, and the exchanges of the layers."""
    config = load_config("digits", ["train.global_batch=4"])
    feed = OneUnreadable(images_and_labels(10), config, torch.device("cpu"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), SyncBatchNorm(4))
    with exchange.record() as made, pytest.raises(ConfigError) as caught:
        evaluate(Classify(), model, feed, TEST, config, workers(), statistics=statistics)
    return str(caught.value), sum(each.kind == "moments" for each in made)


def feed_of(data: Dataset, config: Config) -> MemoryFeed:
    return MemoryFeed(data, config, torch.device("cpu"))


def take_whole_step(
    setup: Setup, feed: Feed, step: int, take: Callable[..., StepResult] = training_step
) -> StepResult:
    """Take a step on all training samples in their order, in epoch 1."""
    indices = torch.arange(feed.sizes[TRAIN])
    batches = feed.batches(TRAIN, setup.forwards(indices), 1)
    return take(setup, batches, StepBatch(indices, 1, step), Flags())


def images_and_labels(count: int) -> Dataset:
    """Random 1x8x8 images of four classes; their mean drifts along the set, so shards differ."""
    generator = torch.Generator().manual_seed(1)
    drift = torch.linspace(-1, 1, count, dtype=torch.float64).view(-1, 1, 1, 1)
    images = torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64) + drift
    split = Split(images, torch.arange(count) % 4)
    return dataset_of(split, split, 4)


def setup_of(config: Config, workers: Workers, feed: Feed, total_steps: int = 10) -> Setup:
    """Build a setup on all ranks; a configuration may name what is in `tests`."""
    task = task_of(config, workers.device, feed, ("tests",))
    model = make_bare_model(config, workers.device, feed, total_steps, ("tests",))
    return make_setup(config, workers, feed, total_steps, model, task)


def one_step(
    count: int, overrides: list[str], steps: int = 1
) -> tuple[StepResult, list[Tensor], dict[str, Tensor]]:
    """Take steps on the same `count` samples over all ranks.

    Returns:
        The last result, the parameters and the buffers.
    """
    options = ["train.dtype=float64", "norm.momentum=0.1", "model.name=tests.train.nets:thin"]
    config = load_config("digits", [*options, *overrides])
    feed = feed_of(images_and_labels(count), config)
    setup = setup_of(config, workers(), feed)
    for step in range(1, steps + 1):
        result = take_whole_step(setup, feed, step)
    setup.flush_statistics()
    parameters = [parameter.detach().clone() for parameter in setup.evaluated_model.parameters()]
    return (
        result,
        parameters,
        {name: buffer.clone() for name, buffer in setup.evaluated_model.named_buffers()},
    )


def unused_steps(overrides: list[str]) -> tuple[list[str], list[Tensor], list[Tensor]]:
    """Take a step, freeze the first parameter, and take another.

    Returns:
        The kinds of the exchanges of the second but for the layers', and the parameters before and
        after it.
    """
    config = load_config("digits", ["train.dtype=float64", *overrides])
    feed = feed_of(images_and_labels(12), config)
    setup = setup_of(config, workers(), feed)
    take_whole_step(setup, feed, 1)
    parameters = list(setup.model.parameters())
    parameters[0].requires_grad_(False)
    before = [parameter.detach().clone() for parameter in parameters]
    with exchange.record() as made:
        take_whole_step(setup, feed, 2)
    kinds = [each.kind for each in made if each.kind not in ("moments", "gradients")]
    assert not parameters[0].requires_grad
    return kinds, before, [parameter.detach().clone() for parameter in parameters]


def plain_steps(count: int, model: str, steps: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Take the steps of `one_step` in a loop under plain DistributedDataParallel.

    Returns:
        The parameters and the buffers.
    """
    config = load_config(
        "digits", ["train.dtype=float64", "norm.momentum=0.1", f"model.name={model}"]
    )
    data = images_and_labels(count)
    feed = feed_of(data, config)
    net = prepare_ddp(make_bare_model(config, torch.device("cpu"), feed, 10, ("tests",)))
    ddp = DistributedDataParallel(net)
    optimizer = optim.make_optimizer(
        config.train.optimizer.name,
        parameter_groups(net, config.train),
        config.train.lr,
        config.train.optimizer.options,
    )
    schedule = optim.make_schedule(
        config.train.schedule.name, optimizer, config.train.schedule.warmup, 10, {}
    )
    mine = data.train[shard(count, dist.get_rank(), dist.get_world_size())]
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(
            ddp(Standardise(data.inputs, torch.float64)(mine.images)), mine.labels
        )
        scale_loss(loss, len(mine)).backward()
        optimizer.step()
        schedule.step()
    return [parameter.detach().clone() for parameter in net.parameters()], dict(net.named_buffers())


def first_warnings(options: list[str]) -> list[str]:
    """Collect the warnings of building a setup and of its first step."""
    config = load_config("digits", ["train.dtype=float64", *options])
    feed = feed_of(images_and_labels(12), config)
    said = Said()
    logging.getLogger().addHandler(said)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            setup = setup_of(config, workers(), feed)
            take_whole_step(setup, feed, 1, first_step)
    finally:
        logging.getLogger().removeHandler(said)
    return said.lines + [str(warning.message) for warning in warned]


class Said(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def digests_of(shift_by_rank: bool) -> list[str]:
    """Gather the digests of a layer whose running mean is the rank, or the same on all."""
    layer = nn.BatchNorm1d(3)
    assert layer.running_mean is not None
    layer.running_mean += dist.get_rank() if shift_by_rank else 1
    return gather_digests(layer)


def train_sections(
    folder: str, sections: dict[str, Any], stop_at: int | None = None
) -> tuple[Outcome, Progress]:
    """Train by a whole configuration; the first rank may be asked to stop."""
    # A rank of the pool is a daemon, which may have no processes of its own; a worker is none.
    multiprocessing.current_process().daemon = False
    progress = Progress()
    watch = Free(stop_at if dist.get_rank() == 0 else None, progress)
    return train(Config(**sections), workers(), Path(folder), progress, watch, ("tests",)), progress


def warnings_of_sections(folder: str, sections: dict[str, Any]) -> list[str]:
    """Train by a whole configuration; what is logged of warnings."""
    said = Said()
    logging.getLogger().addHandler(said)
    try:
        train_sections(folder, sections)
    finally:
        logging.getLogger().removeHandler(said)
    return said.lines


def refused_sections(sections: dict[str, Any]) -> str:
    """Return the error of a configuration that must be refused before the first step."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            train_sections(folder, sections)
        except ConfigError as error:
            assert not list(Path(folder).iterdir())
            return str(error)
    raise AssertionError("it has trained")


def failed_sections(sections: dict[str, Any]) -> str:
    """Return the error of a run that must fail."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            train_sections(folder, sections)
        except (ConfigError, ExchangeError) as error:
            assert not multiprocessing.active_children(), "processes that load live on"
            return str(error)
    raise AssertionError("it has trained")


def error_of_sections(folder: str, sections: dict[str, Any]) -> str:
    """Train in a folder; the error with which that is refused, empty if it is not."""
    try:
        train_sections(folder, sections)
    except ConfigError as error:
        return str(error)
    return ""


def failed_by_gloo(sections: dict[str, Any]) -> str:
    """Return the same where workers have no memory in common."""
    with mock.patch.object(shared, "segment_of", return_value=None):
        return failed_sections(sections)


def train_example(
    folder: str,
    config: str,
    overrides: list[str],
    stop_at: int | None = None,
    stopped_rank: int = 0,
) -> tuple[Outcome, Progress]:
    """Train by a configuration of examples/; one rank may be asked to stop."""
    progress = Progress()
    watch = Free(stop_at if dist.get_rank() == stopped_rank else None, progress)
    path = Path(__file__).parents[2] / config
    return train(
        load_config(str(path), overrides), workers(), Path(folder), progress, watch, ("examples",)
    ), progress
