"""A training run on one of its workers, from wherever it stands to its end."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm.errors import SyncnormError
from syncnorm.train.buffers import SharedBuffers
from syncnorm.train.checkpoint.capture import capture, versions
from syncnorm.train.checkpoint.progress import Position
from syncnorm.train.checkpoint.resume import resume
from syncnorm.train.checkpoint.saver import BackgroundSaver
from syncnorm.train.checkpoint.store import CheckpointStore
from syncnorm.train.config.schema import Config
from syncnorm.train.data.datasets import Dataset, epoch_order, shard
from syncnorm.train.diagnose import NotFiniteError, describe_not_finite
from syncnorm.train.digest import gather_digests
from syncnorm.train.first_step import first_step
from syncnorm.train.memory import check_memory
from syncnorm.train.recorder import Follower
from syncnorm.train.setup import Learner, load_data, make_bare_model, make_learner
from syncnorm.train.step import StepBatch, StepResult, evaluate, training_step
from syncnorm.train.workers import Workers

CHECKPOINTS = "checkpoints"
# Steps in a row that may be left out for not being finite; more are no accident.
_MOST_SKIPPED = 10


class SaveError(SyncnormError):
    """The state that a run ends with could not be saved; raised by all workers."""


class Watch(Protocol):
    """What the surroundings of a run want to know and to say."""

    def alive(self) -> None:
        """This worker makes progress."""
        ...

    @property
    def stop(self) -> str | None:
        """Why this worker was asked to stop, if it was."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What a run hands back, the same on all workers.

    Args:
        test_accuracy: share of the test set, 0 to 1; None if the run was stopped before the first
            evaluation.
        digests: fingerprint of each worker's running statistics, in rank order.
        is_done: whether all epochs are done; otherwise the run was asked to stop, and has saved its
            state.
    """

    test_accuracy: float | None
    digests: list[str]
    is_done: bool


@dataclass
class Run:
    """What the steps of a run work on."""

    config: Config
    workers: Workers
    data: Dataset
    learner: Learner
    position: Position
    watch: Watch
    follower: Follower
    saver: BackgroundSaver | None
    steps_per_epoch: int
    skipped: int = 0
    is_new: bool = True


def train(
    config: Config,
    workers: Workers,
    folder: Path,
    position: Position,
    watch: Watch,
    allowed: tuple[str, ...] = (),
) -> Outcome:
    """Train on this worker's part of every step; all workers must call it with the same
    configuration.

    Goes on from the newest good checkpoint in the run's folder, if there is one.

    Args:
        config: what to train.
        workers: this worker's place.
        folder: the run's folder; the first worker writes `metrics.jsonl` and `checkpoints` into it.
        position: is kept up to date.
        watch: told of progress, asked whether to stop.
        allowed: packages whose callables the configuration may name.

    Raises:
        ConfigError: something in the configuration turns out not to fit; on all workers.
        NotFiniteError: a loss is not finite; on all workers.
        SaveError: the last state could not be saved; on all workers.
    """
    data = load_data(config, workers.device, allowed)
    watch.alive()
    steps_per_epoch = math.ceil(len(data.train) / config.train.global_batch)
    total_steps = config.train.epochs * steps_per_epoch
    # Built once: what a callable of the user's does as it builds, a download say, it does once.
    model = make_bare_model(config, data, total_steps, allowed)
    check_memory(config, workers, data, model)
    learner = make_learner(config, workers, data, total_steps, model=model)
    store = (
        CheckpointStore(folder / CHECKPOINTS, config.checkpoint.keep) if workers.is_first else None
    )
    resumed = resume(learner, position, store)
    saver = None if store is None else BackgroundSaver(store)
    with Follower(learner, folder, position, total_steps) as follower:
        run = Run(config, workers, data, learner, position, watch, follower, saver, steps_per_epoch)
        _tell_start(run, resumed.source)
        for fault in resumed.faults:
            follower.fault("checkpoint", fault)
        is_done = _epochs(run)
        digests = gather_digests(learner.model)
        follower.metrics.write_timed(
            "end" if is_done else "stop",
            step=position.step,
            test_accuracy=position.test_accuracy,
            digests=digests,
        )
    return Outcome(position.test_accuracy, digests, is_done)


def _tell_start(run: Run, source: str | None) -> None:
    model = run.learner.model
    run.follower.metrics.write_timed(
        "start",
        step=run.position.step,
        world_size=run.workers.world_size,
        device=str(run.workers.device.type),
        resumed_from=source,
        versions=versions(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        placement=run.learner.describe_step(),
    )
    if source is not None:
        run.follower.display.say(f"resumed from {source} on {run.workers.world_size} worker(s)")


def _epochs(run: Run) -> bool:
    """Train until all epochs are done (True) or somebody asks to stop (False)."""
    position = run.position
    if position.step_in_epoch == run.steps_per_epoch or position.epoch == 0:
        position.epoch, position.step_in_epoch, position.loss_sum = position.epoch + 1, 0, 0.0
    while position.epoch <= run.config.train.epochs:
        if not _epoch(run):
            return False
        position.epoch, position.step_in_epoch, position.loss_sum = position.epoch + 1, 0, 0.0
    position.epoch -= 1
    return True


def _epoch(run: Run) -> bool:
    """Train on what is left of an epoch and evaluate; False if somebody asks to stop."""
    position, train = run.position, run.config.train
    order = epoch_order(len(run.data.train), train.seed, position.epoch)
    batches = order.split(train.global_batch)
    for indices in batches[position.step_in_epoch :]:
        result, rate = take_step(run, indices)
        is_last = position.step_in_epoch == run.steps_per_epoch
        if is_last:
            _judge(run, rate)
        is_end = is_last and position.epoch == train.epochs
        _save_if_due(run, is_last=is_last, must=is_end or result.stop)
        if result.stop and not is_end:
            return False
    return True


def take_step(run: Run, indices: Tensor) -> tuple[StepResult, float]:
    """Train on the samples of a step, and put it on record; its result and its learning rate."""
    position = run.position
    rate = float(run.learner.schedule.get_last_lr()[0])
    batch = StepBatch(indices, position.epoch, position.step + 1)
    take = first_step if run.is_new else training_step
    run.is_new = False
    result = take(run.learner, run.data, batch, run.watch.stop is not None)
    if result.was_taken:
        run.skipped = 0
    else:
        _not_finite(run, batch, result)
    position.step += 1
    position.step_in_epoch += 1
    # A step that was left out has no loss to speak of.
    position.loss_sum += result.loss if result.was_taken else 0.0
    run.watch.alive()
    run.follower.after_step(result, len(indices), rate)
    return result, rate


def _judge(run: Run, rate: float) -> None:
    """Evaluate on the test set."""
    position, config = run.position, run.config
    mine = run.data.test[shard(len(run.data.test), run.workers.rank, run.workers.world_size)]
    chunk = min(config.train.global_batch, config.launch.micro_batch or config.train.global_batch)
    dtype = getattr(torch, config.train.dtype)
    with run.learner.precision():
        position.test_accuracy = evaluate(
            run.learner.judged, run.data, mine, chunk, dtype, run.watch.alive
        )
    # The forwards may have changed some, and workers make different ones.
    SharedBuffers(run.learner.judged).share(are_alike=False)
    run.follower.after_epoch(position.loss_sum / run.steps_per_epoch, rate, config.train.epochs)


def _not_finite(run: Run, batch: StepBatch, result: StepResult) -> None:
    """Stop, or leave the step out; the same on all workers."""
    message = describe_not_finite(run.learner, run.data, batch, result)
    run.follower.fault("not_finite", message)
    run.skipped += 1
    if run.config.train.not_finite == "stop":
        raise NotFiniteError(
            f"{message}. Lower train.lr, set train.clip, or leave such steps out: not_finite=skip."
        )
    if run.skipped > _MOST_SKIPPED:
        raise NotFiniteError(
            f"{message}; and {_MOST_SKIPPED} steps before it were left out for the same reason"
        )


def _save_if_due(run: Run, *, is_last: bool, must: bool) -> None:
    """Save after each epoch, or every so many steps; and what the run ends with, waiting until it
    is on disk.

    *Collectives*: where it saves, those of `capture`; every worker decides alike.
    """
    every, position = run.config.checkpoint.every, run.position
    if not (must or (is_last if every is None else position.step % every == 0)):
        if run.saver is not None:
            run.follower.saved(run.saver.take_results())
        return
    is_best = is_last and _is_best(run)
    snapshot = capture(run.learner, position)
    error: str | None = None
    if run.saver is not None:
        if must or is_best:
            # These must not be left out because the last one is still being written.
            run.saver.wait()
        is_started = run.saver.start(snapshot, is_best=is_best and run.config.checkpoint.best)
        if must:
            run.saver.wait()
        results = run.saver.take_results()
        run.follower.saved(results)
        if not is_started:
            run.follower.metrics.write_timed("unsaved", step=position.step)
        error = results[-1].error if must and results else None
    if must:
        _agree_on(error, position)


def _is_best(run: Run) -> bool:
    accuracy, best = run.position.test_accuracy, run.position.best_accuracy
    if accuracy is None or (best is not None and accuracy <= best):
        return False
    run.position.best_accuracy = accuracy
    return True


def _agree_on(error: str | None, position: Position) -> None:
    """Wait for the first worker's save, and share its fate."""
    shared = [error]
    dist.broadcast_object_list(shared, src=0)
    if shared[0] is not None:
        raise SaveError(f"the state after step {position.step} could not be saved: {shared[0]}")
