"""A training run on one of its workers, from wherever it stands to its end.

train
    _train_epochs
        _train_epoch
            take_step       one optimizer step (`syncnorm.train.step`), recorded
            _evaluate       after the last step of an epoch
            _save_if_due    a checkpoint, where one is due
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm.errors import SyncnormError
from syncnorm.placement import epoch_order, shard
from syncnorm.train.buffers import SharedBuffers, gather_digests
from syncnorm.train.checkpoint.capture import Progress, capture, resume
from syncnorm.train.checkpoint.saver import BackgroundSaver
from syncnorm.train.checkpoint.store import CheckpointStore
from syncnorm.train.config.schema import Config
from syncnorm.train.data.datasets import Dataset
from syncnorm.train.diagnose import NotFiniteError, describe_not_finite, first_step
from syncnorm.train.memory import check_memory
from syncnorm.train.placement import Workers
from syncnorm.train.recorder import Recorder
from syncnorm.train.setup import Setup, load_data, make_bare_model, make_setup
from syncnorm.train.step import StepBatch, StepResult, evaluate, training_step

CHECKPOINTS = "checkpoints"
# Steps in a row that may be left out for not being finite; more are no accident.
_MOST_SKIPPED = 10


class SaveError(SyncnormError):
    """The state that a run ends with could not be saved; raised by all workers."""


class Watch(Protocol):
    """The surroundings of a run: they learn of its progress, and may ask it to stop."""

    def alive(self) -> None:
        """Note that this worker makes progress."""
        ...

    @property
    def stop(self) -> str | None:
        """The reason why this worker was asked to stop, if it was."""
        ...


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run, the same on all workers.

    Args:
        test_accuracy: share of the test set, 0 to 1; None if the run was stopped before the first
            evaluation.
        digests: SHA-256 of each worker's buffers, in rank order.
        is_done: True if all epochs are done; False if the run was asked to stop, and has saved its
            state.
    """

    test_accuracy: float | None
    digests: list[str]
    is_done: bool


@dataclass
class Run:
    """A run under way, as its steps see it.

    Args:
        config: of the run.
        workers: this worker's rank and device.
        data: training set and test set.
        setup: the model and its optimizer.
        progress: steps and epochs done.
        watch: told of progress, asked whether to stop.
        recorder: writes metrics.
        saver: writes checkpoints; None on all workers but the first.
        steps_per_epoch: the last of them may have fewer samples.
        skipped: steps left out since the last that was taken.
        is_new: True until this process has taken a step.
    """

    config: Config
    workers: Workers
    data: Dataset
    setup: Setup
    progress: Progress
    watch: Watch
    recorder: Recorder
    saver: BackgroundSaver | None
    steps_per_epoch: int
    skipped: int = 0
    is_new: bool = True


def train(
    config: Config,
    workers: Workers,
    folder: Path,
    progress: Progress,
    watch: Watch,
    allowed: tuple[str, ...] = (),
) -> Outcome:
    """Train on this worker's part of every step.

    The run goes on from the newest good checkpoint in its folder, if there is one. All workers must
    call, with the same configuration.

    Args:
        config: of the run.
        workers: this worker's rank and device.
        folder: the run's folder; the first worker writes `metrics.jsonl` and `checkpoints` into it.
        progress: is kept up to date.
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
    setup = make_setup(config, workers, data, total_steps, model=model)
    store = (
        CheckpointStore(folder / CHECKPOINTS, config.checkpoint.keep) if workers.is_first else None
    )
    resumed = resume(setup, progress, store)
    saver = None if store is None else BackgroundSaver(store)
    with Recorder(setup, folder, progress, total_steps) as recorder:
        run = Run(config, workers, data, setup, progress, watch, recorder, saver, steps_per_epoch)
        recorder.record_start(resumed)
        is_done = _train_epochs(run)
        digests = gather_digests(setup.model)
        recorder.record_end(digests, is_done=is_done)
    return Outcome(progress.test_accuracy, digests, is_done)


def _train_epochs(run: Run) -> bool:
    """Train until all epochs are done (True) or some worker is asked to stop (False)."""
    progress = run.progress
    if progress.step_in_epoch == run.steps_per_epoch or progress.epoch == 0:
        progress.begin_epoch()
    while progress.epoch <= run.config.train.epochs:
        if not _train_epoch(run):
            return False
        progress.begin_epoch()
    progress.epoch -= 1
    return True


def _train_epoch(run: Run) -> bool:
    """Train on the rest of an epoch and evaluate; False if some worker is asked to stop."""
    progress, train = run.progress, run.config.train
    order = epoch_order(len(run.data.train), train.seed, progress.epoch)  # (N,)
    order = order.to(run.workers.device)
    batches = order.split(train.global_batch)
    for indices in batches[progress.step_in_epoch :]:
        result, lr = take_step(run, indices)
        is_last = progress.step_in_epoch == run.steps_per_epoch
        if is_last:
            _evaluate(run, lr)
        is_end = is_last and progress.epoch == train.epochs
        _save_if_due(run, ends_epoch=is_last, ends_run=is_end or result.stop)
        if result.stop and not is_end:
            return False
    return True


def take_step(run: Run, indices: Tensor) -> tuple[StepResult, float]:
    """Train on the samples of a step, and record it.

    Returns:
        The step's result and its learning rate.
    """
    progress = run.progress
    lr = float(run.setup.schedule.get_last_lr()[0])
    batch = StepBatch(indices, progress.epoch, progress.step + 1)
    step = first_step if run.is_new else training_step
    run.is_new = False
    result = step(run.setup, run.data, batch, run.watch.stop is not None)
    if result.was_taken:
        run.skipped = 0
    else:
        _handle_not_finite(run, batch, result)
    progress.step += 1
    progress.step_in_epoch += 1
    # A step that was left out has no loss to speak of.
    progress.loss_sum += result.loss if result.was_taken else 0.0
    run.watch.alive()
    run.recorder.record_step(result, len(indices), lr)
    return result, lr


def _handle_not_finite(run: Run, batch: StepBatch, result: StepResult) -> None:
    """Stop, or leave the step out; the same on all workers."""
    message = describe_not_finite(run.setup, run.data, batch, result)
    run.recorder.record_fault("not_finite", message)
    run.skipped += 1
    if run.config.train.not_finite == "stop":
        raise NotFiniteError(
            f"{message}. Lower train.lr, set train.clip, or leave such steps out: not_finite=skip."
        )
    if run.skipped > _MOST_SKIPPED:
        raise NotFiniteError(
            f"{message}; and {_MOST_SKIPPED} steps before it were left out for the same reason"
        )


def _evaluate(run: Run, lr: float) -> None:
    """Evaluate on the test set, each worker on its shard, and record the epoch."""
    progress, config, model = run.progress, run.config, run.setup.evaluated_model
    mine = run.data.test[shard(len(run.data.test), run.workers.rank, run.workers.world_size)]
    chunk = min(config.train.global_batch, config.launch.micro_batch or config.train.global_batch)
    dtype = getattr(torch, config.train.dtype)
    with run.setup.autocast():
        progress.test_accuracy = evaluate(model, run.data, mine, chunk, dtype, run.watch.alive)
    # The forwards may have changed some, and workers make different ones.
    SharedBuffers(model).broadcast(are_alike=False)
    mean_loss = progress.loss_sum / run.steps_per_epoch
    run.recorder.record_epoch(mean_loss, lr, config.train.epochs)


def _save_if_due(run: Run, *, ends_epoch: bool, ends_run: bool) -> None:
    """Save after each epoch, or every so many steps, in the background.

    The state that the run ends with is saved in any case, and waited for.

    *Collectives*: where it saves, those of `capture`; every worker decides alike.

    Raises:
        SaveError: the last state could not be saved; on all workers.
    """
    every, progress = run.config.checkpoint.every, run.progress
    is_due = ends_epoch if every is None else progress.step % every == 0
    if not (ends_run or is_due):
        if run.saver is not None:
            run.recorder.record_saves(run.saver.pop_results())
        return
    is_best = ends_epoch and progress.update_best()
    snapshot = capture(run.setup, progress)
    error: str | None = None
    if run.saver is not None:
        if ends_run or is_best:
            # These must not be left out because the last one is still being written.
            run.saver.wait()
        is_started = run.saver.start(snapshot, is_best=is_best and run.config.checkpoint.best)
        if ends_run:
            run.saver.wait()
        results = run.saver.pop_results()
        run.recorder.record_saves(results)
        if not is_started:
            run.recorder.record_unsaved()
        error = results[-1].error if ends_run and results else None
    if ends_run:
        _raise_save_error(error, progress)


def _raise_save_error(error: str | None, progress: Progress) -> None:
    """Wait for the first worker's save, and raise its error, if any, on all workers."""
    shared = [error]
    dist.broadcast_object_list(shared, src=0)
    if shared[0] is not None:
        raise SaveError(f"the state after step {progress.step} could not be saved: {shared[0]}")
