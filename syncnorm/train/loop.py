"""A training run on one of its workers, from the first weight to the final checkpoint."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm.train.checkpoint import save_checkpoint
from syncnorm.train.config import Config
from syncnorm.train.data import Dataset, epoch_order, local_batches, shard
from syncnorm.train.display import Display
from syncnorm.train.learner import Learner, load_data, make_learner
from syncnorm.train.metrics import MetricsFile
from syncnorm.train.statistics import gather_digests
from syncnorm.train.step import evaluate, training_step
from syncnorm.train.workers import Workers


@dataclass
class Position:
    """How far a run has come; readable from outside when the run ends early."""

    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a finished run hands back, the same on all workers.

    Args:
        test_accuracy: share of the test set, 0 to 1.
        digests: fingerprint of each worker's running statistics, in rank order.
    """

    test_accuracy: float
    digests: list[str]


@dataclass(frozen=True)
class EpochRecord:
    """What an epoch showed: loss and learning rate of each of its steps, and the test accuracy after it."""

    losses: list[float]
    rates: list[float]
    test_accuracy: float
    seconds: float

    @property
    def mean_loss(self) -> float:
        """Mean over the steps."""
        return sum(self.losses) / len(self.losses)


def train(config: Config, workers: Workers, folder: Path, position: Position) -> Outcome:
    """Train on this worker's shards; all workers must call it with the same configuration.

    Args:
        config: what to train.
        workers: this worker's place.
        folder: the run's folder; the first worker writes `metrics.jsonl` and `checkpoint.pt` into it.
        position: is kept up to date.
    """
    data = load_data(config, workers.device)
    steps_per_epoch = math.ceil(len(data.train) / config.train.global_batch)
    learner = make_learner(config, data, steps_per_epoch)
    metrics = MetricsFile(folder / "metrics.jsonl" if workers.is_first else None)
    record = None
    with Display(config.train.epochs * steps_per_epoch, quiet=not workers.is_first) as display:
        for position.epoch in range(1, config.train.epochs + 1):
            record = run_epoch(config, workers, data, learner, position, display)
            write_epoch(metrics, position, record)
            display.say(epoch_line(config, position, record))
    assert record is not None  # the schema asks for at least one epoch

    digests = gather_digests(learner.model)
    metrics.write("end", step=position.step, test_accuracy=record.test_accuracy, digests=digests)
    if workers.is_first:
        save_checkpoint(
            folder / "checkpoint.pt",
            model=learner.model,
            optimizer=learner.optimizer,
            step=position.step,
            config=config,
        )
    return Outcome(record.test_accuracy, digests)


def run_epoch(
    config: Config,
    workers: Workers,
    data: Dataset,
    learner: Learner,
    position: Position,
    display: Display,
) -> EpochRecord:
    """Train on every sample once, then evaluate."""
    started = time.perf_counter()
    order = epoch_order(len(data.train), config.train.seed, position.epoch)
    losses: list[Tensor] = []
    rates: list[float] = []
    for batch in local_batches(data.train, order, config.train.global_batch, workers.rank, workers.world_size):
        rates.append(float(learner.schedule.get_last_lr()[0]))
        losses.append(training_step(learner.ddp, learner.optimizer, batch))
        learner.schedule.step()
        position.step += 1
        display.advance()
    test_shard = data.test[shard(len(data.test), workers.rank, workers.world_size)]
    accuracy = evaluate(learner.model, test_shard, config.train.global_batch)
    return EpochRecord(pool_losses(losses), rates, accuracy, time.perf_counter() - started)


def pool_losses(losses: list[Tensor]) -> list[float]:
    """Average each step's scaled loss over the workers, which is the loss of its global batch."""
    stacked = torch.stack(losses).double()
    dist.all_reduce(stacked)
    return (stacked / dist.get_world_size()).tolist()


def write_epoch(metrics: MetricsFile, position: Position, record: EpochRecord) -> None:
    """Write one `step` event per step, then the `epoch` event."""
    first = position.step - len(record.losses) + 1
    for index, (loss, rate) in enumerate(zip(record.losses, record.rates, strict=True)):
        metrics.write("step", step=first + index, loss=loss, lr=rate)
    metrics.write(
        "epoch",
        epoch=position.epoch,
        step=position.step,
        loss=record.mean_loss,
        test_accuracy=record.test_accuracy,
        lr=record.rates[-1],
        seconds=record.seconds,
    )


def epoch_line(config: Config, position: Position, record: EpochRecord) -> str:
    """Say in one line how the epoch went."""
    return (
        f"epoch {position.epoch}/{config.train.epochs}  step {position.step}  loss {record.mean_loss:.4f}"
        f"  test accuracy {100 * record.test_accuracy:.2f} %"
        f"  lr {record.rates[-1]:.3g}  {record.seconds:.2f} s"
    )
