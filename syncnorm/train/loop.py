"""A training run on one of its workers, from wherever it stands to its end.

train
    _train_epochs
        _train_epoch
            take_step       one optimizer step (`syncnorm.train.step`), recorded
            _evaluate       after the last step of an epoch, or every so many steps
            _save_if_due    a checkpoint, where one is due
    _final_metrics          with those of the test set, where a validation set has decided
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from syncnorm.errors import ConfigError, SyncnormError
from syncnorm.train.buffers import SharedBuffers, gather_digests
from syncnorm.train.callbacks import Callback
from syncnorm.train.checkpoint.capture import Progress, capture, resume
from syncnorm.train.checkpoint.saver import BackgroundSaver
from syncnorm.train.checkpoint.store import CHECKPOINTS, CheckpointStore
from syncnorm.train.config.schema import Config
from syncnorm.train.data.feed import TEST, TRAIN, VALIDATION, Feed, judged_split
from syncnorm.train.data.regimes import training_order
from syncnorm.train.data.same import check_same_data, warn_of_own_random_numbers
from syncnorm.train.diagnose import NotFiniteError, describe_not_finite, first_step
from syncnorm.train.memory import check_memory
from syncnorm.train.predictions import collect_predictions
from syncnorm.train.recorder import Recorder
from syncnorm.train.renewal import renew_statistics
from syncnorm.train.setup import (
    Setup,
    check_decides,
    load_feed,
    make_bare_model,
    make_setup,
    task_of,
)
from syncnorm.train.step import StepBatch, StepResult, evaluate, training_step
from syncnorm.train.step_notes import Flags
from syncnorm.train.storage.mirror import Mirror
from syncnorm.train.waiting import from_all, from_first
from syncnorm.train.weights import load_weights
from syncnorm.train.workers import Workers

# Steps in a row that may be left out for not being finite; more are no accident.
_MOST_SKIPPED = 10
# For a save that is under way when a run fails; less than what the other workers wait for this one.
_LAST_SAVE_SECONDS = 20.0


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
        metrics: of the last evaluation, by the name of the split; of a run that is done also on the
            test set. The task's deciding metric comes first. Empty before the first evaluation.
        digests: SHA-256 of each worker's buffers, in rank order.
        is_done: True if all epochs are done; False if the run was asked to stop, and has saved its
            state.
        step: optimizer steps done.
        reason: for being done; or by whom or what the run was asked to stop.
    """

    metrics: Mapping[str, Mapping[str, float]]
    digests: list[str]
    is_done: bool
    step: int
    reason: str = ""


@dataclass
class Run:
    """A run under way, as its steps see it.

    Args:
        config: of the run.
        workers: this worker's rank and device.
        feed: of the data.
        setup: the model and its optimizer.
        progress: steps and epochs done.
        watch: told of progress, asked whether to stop.
        recorder: writes metrics.
        saver: writes checkpoints; None on all workers but the first.
        steps_per_epoch: the last of them may have fewer samples.
        saved_at: time of the last checkpoint or of the start, by this process's clock.
        skipped: steps left out since the last that was taken.
        is_new: True until this process has taken a step.
        callbacks: code of the user's, called on every worker.
        stop_reason: of a callback that has asked this worker to stop.
    """

    config: Config
    workers: Workers
    feed: Feed
    setup: Setup
    progress: Progress
    watch: Watch
    recorder: Recorder
    saver: BackgroundSaver | None
    steps_per_epoch: int
    skipped: int = 0
    is_new: bool = True
    saved_at: float = field(default_factory=time.monotonic)
    callbacks: Sequence[Callback] = ()
    stop_reason: str | None = None

    @property
    def model(self) -> nn.Module:
        """The network in training, without its wrapper of DistributedDataParallel."""
        return self.setup.model

    def stop(self, reason: str) -> None:
        """Save and end the run after the next step; one worker's word is enough. It can be resumed.

        Args:
            reason: for `exit.json` and the result; of several workers, that of the first.
        """
        self.stop_reason = reason

    @property
    def flags(self) -> Flags:
        """The wishes of this worker's surroundings. The first one's clock says when to save."""
        minutes = self.config.checkpoint.minutes
        is_late = minutes is not None and time.monotonic() - self.saved_at > 60 * minutes
        is_asked_to_stop = self.watch.stop is not None or self.stop_reason is not None
        return Flags(is_asked_to_stop, is_late and self.workers.is_first)

    @property
    def is_out_of_patience(self) -> bool:
        """True if the validation set has seen nothing better for long enough."""
        patience = self.config.train.patience
        return patience is not None and self.progress.since_best >= patience


def train(
    config: Config,
    workers: Workers,
    folder: Path,
    progress: Progress,
    watch: Watch,
    allowed: tuple[str, ...] = (),
    callbacks: Sequence[Callback] = (),
    *,
    begin: Callable[[], None] = lambda: None,
    mirror: Mirror | None = None,
    shows: bool = True,
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
        callbacks: called at points of the run, the same ones on all workers.
        begin: called on the first worker once nothing more can be refused, before the first step.
        mirror: on the first worker, copies the folder to the run's store, if it has one.
        shows: True to show the run on the screen.

    Raises:
        ConfigError: something in the configuration turns out not to fit; on all workers.
        NotFiniteError: a loss is not finite; on all workers.
        SaveError: the last state could not be saved; on all workers.
    """
    with closing(load_feed(config, workers.device, allowed)) as feed:
        watch.alive()
        check_same_data(feed, workers)
        warn_of_own_random_numbers(feed)
        steps_per_epoch = math.ceil(feed.sizes[TRAIN] / config.train.global_batch)
        total_steps = config.train.epochs * steps_per_epoch
        # Built once: what a callable of the user's does as it builds, a download say, it does once.
        task = task_of(config, workers.device, feed, allowed)
        model = make_bare_model(config, workers.device, feed, total_steps, allowed)
        check_memory(config, workers, feed, model, task)
        setup = make_setup(config, workers, feed, total_steps, model, task)
        store = (
            CheckpointStore(folder / CHECKPOINTS, config.checkpoint.keep)
            if workers.is_first
            else None
        )
        resumed = resume(setup, progress, store)
        if resumed.source is None:
            check_decides(config, task)
            load_weights(setup.model, config.model, workers)
        from_first(workers.is_first, begin)
        saver = None if store is None else BackgroundSaver(store)
        with (
            _last_save(saver, watch, config.timeout_seconds),
            Recorder(
                setup, folder, progress, total_steps, allowed, mirror=mirror, shows=shows
            ) as recorder,
        ):
            run = Run(
                config,
                workers,
                feed,
                setup,
                progress,
                watch,
                recorder,
                saver,
                steps_per_epoch,
                callbacks=callbacks,
            )
            recorder.record_start(resumed, feed)
            for callback in callbacks:
                callback.on_start(run)
            is_done = _train_epochs(run)
            metrics = _final_metrics(run, is_done)
            if is_done and not run.is_new and metrics:
                split = list(metrics)[-1]
                recorder.record_predictions(collect_predictions(setup, feed, split, watch.alive))
            for callback in callbacks:
                callback.on_end(run, metrics)
            digests = gather_digests(setup.model)
            recorder.record_end(metrics, digests, judged_split(feed), is_done=is_done)
            recorder.close_loggers(watch.alive, is_done=is_done)
        return Outcome(metrics, digests, is_done, progress.step, _reason(run, is_done))


@contextmanager
def _last_save(
    saver: BackgroundSaver | None, watch: Watch, timeout_seconds: float
) -> Iterator[None]:
    """Finish a save that is under way when the block fails: its state is good to go on from."""
    try:
        yield
    except BaseException:
        if saver is not None:
            # The others wait for this worker meanwhile, and must not be the first to give up.
            watch.alive()
            saver.wait(min(_LAST_SAVE_SECONDS, timeout_seconds / 2))
        raise


def _reason(run: Run, is_done: bool) -> str:
    """Describe why the run ends, alike on all workers.

    *Collectives*: of a run that was asked to stop, one gathering of who was asked.
    """
    if not is_done:
        mine = f"asked to stop by {run.watch.stop}" if run.watch.stop else run.stop_reason
        return next(filter(None, from_all(mine)), "asked to stop")
    if run.is_out_of_patience:
        return f"the last {run.progress.since_best} evaluations were no better"
    return "all epochs done"


def _train_epochs(run: Run) -> bool:
    """Train until all epochs or patience are done (True) or some worker is asked to stop."""
    progress = run.progress
    if progress.step_in_epoch == run.steps_per_epoch or progress.epoch == 0:
        progress.begin_epoch()
    while progress.epoch <= run.config.train.epochs and not run.is_out_of_patience:
        if not _train_epoch(run):
            return run.is_out_of_patience
        progress.begin_epoch()
    if progress.step_in_epoch == 0:
        progress.epoch -= 1
    return True


def _train_epoch(run: Run) -> bool:
    """Train on the rest of an epoch, and evaluate; False if the run ends here."""
    progress, train = run.progress, run.config.train
    order = training_order(run.config, run.feed, progress.epoch)  # (N,)
    order = order.to(run.feed.index_device)
    steps = order.split(train.global_batch)[progress.step_in_epoch :]
    forwards = (forward for indices in steps for forward in run.setup.forwards(indices))
    batches = run.feed.batches(TRAIN, forwards, progress.epoch)
    for indices in steps:
        result, lr = take_step(run, batches, indices)
        is_last = progress.step_in_epoch == run.steps_per_epoch
        is_end = is_last and progress.epoch == train.epochs
        is_judged, is_best = _is_judged(run, is_last, is_end), False
        if is_judged or is_end:
            renew_statistics(run.setup, run.feed, progress.epoch, run.watch.alive)
        if is_judged:
            is_best = _evaluate(run)
            is_end = is_end or run.is_out_of_patience
        if is_last:
            mean_loss = progress.mean_loss
            run.recorder.record_epoch(mean_loss, lr, judged_split(run.feed) if is_judged else None)
            for callback in run.callbacks:
                callback.on_epoch(run, mean_loss)
        elif is_judged:
            run.recorder.record_evaluation(judged_split(run.feed))
        _save_if_due(
            run,
            is_due=_is_save_due(run, is_last, result),
            is_best=is_best,
            ends_run=is_end or result.stop,
        )
        if run.is_out_of_patience or (result.stop and not is_end):
            return False
    return True


def take_step(run: Run, batches: Iterator[Any], indices: Tensor) -> tuple[StepResult, float]:
    """Train on the samples of a step, whose batches come next, and record it.

    Returns:
        The step's result and its learning rate.
    """
    progress = run.progress
    lr = float(run.setup.schedule.get_last_lr()[0])
    batch = StepBatch(indices, progress.epoch, progress.step + 1)
    step = first_step if run.is_new else training_step
    run.is_new = False
    result = step(run.setup, batches, batch, run.flags)
    if result.was_taken or result.has_overflowed:
        run.skipped = 0
        progress.loss_sum += result.loss
    else:
        _handle_not_finite(run, batch, result)
        progress.left_out += 1
    progress.step += 1
    progress.step_in_epoch += 1
    run.watch.alive()
    run.recorder.record_step(result, len(indices), lr)
    for callback in run.callbacks:
        callback.on_step(run, result.loss)
    return result, lr


def _handle_not_finite(run: Run, batch: StepBatch, result: StepResult) -> None:
    """Stop, or leave the step out; the same on all workers."""
    message = describe_not_finite(run.setup, run.feed, batch, result)
    stops = run.config.train.not_finite == "stop"
    run.recorder.record_fault("not_finite", message, ends_run=stops)
    run.skipped += 1
    if stops:
        raise NotFiniteError(
            f"{message}. Lower train.lr, set train.clip, or leave such steps out: "
            "train.not_finite=skip."
        )
    if run.skipped > _MOST_SKIPPED:
        raise NotFiniteError(
            f"{message}; and {_MOST_SKIPPED} steps before it were left out for the same reason"
        )


def _is_judged(run: Run, ends_epoch: bool, ends_run: bool) -> bool:
    """Return True where an evaluation is due."""
    every = run.config.train.evaluate_every
    is_due = ends_epoch if every is None else ends_run or run.progress.step % every == 0
    return is_due and judged_split(run.feed) is not None


def _evaluate(run: Run) -> bool:
    """Evaluate, each worker on its shard; True if nothing was better before.

    It is the validation set that decides, never the test set.
    """
    progress, split = run.progress, judged_split(run.feed)
    assert split is not None
    progress.metrics = _metrics(run, split)
    best = run.setup.task.best
    if split != VALIDATION or not best:
        return False
    name = best.removeprefix("-")
    if name not in progress.metrics:
        raise ConfigError(
            f"`task.best` must be measured, got {name!r} of {', '.join(progress.metrics)}"
        )
    value = progress.metrics[name]
    return progress.update_best(-value if best[0] == "-" else value)


def _metrics(run: Run, split: str) -> dict[str, float]:
    setup, model = run.setup, run.setup.evaluated_model
    metrics = evaluate(setup.task, model, run.feed, split, run.config, run.workers, run.watch.alive)
    # The forwards may have changed some, and workers make different ones.
    SharedBuffers(model).broadcast(are_alike=False)
    for callback in run.callbacks:
        callback.on_evaluation(run, split, metrics)
    return metrics


def _final_metrics(run: Run, is_done: bool) -> dict[str, dict[str, float]]:
    """Gather the last metrics, with those of the test set, if it has waited for the end."""
    split, last = judged_split(run.feed), run.progress.metrics
    metrics = {} if split is None or last is None else {split: last}
    if is_done and split == VALIDATION and run.feed.sizes.get(TEST):
        metrics[TEST] = _metrics(run, TEST)
    return metrics


def _is_save_due(run: Run, ends_epoch: bool, result: StepResult) -> bool:
    every = run.config.checkpoint.every
    is_due = ends_epoch if every is None else run.progress.step % every == 0
    return is_due or result.save


def _save_if_due(run: Run, *, is_due: bool, is_best: bool, ends_run: bool) -> None:
    """Save where it is due, in the background.

    The state that the run ends with is saved in any case, and waited for; so is the best one.

    *Collectives*: where it saves, those of `capture`; every worker decides alike.

    Raises:
        SaveError: the last state could not be saved; on all workers.
    """
    progress = run.progress
    keeps_best = is_best and run.config.checkpoint.best is not False
    if not (ends_run or is_due or keeps_best):
        if run.saver is not None:
            run.recorder.record_saves(run.saver.pop_results())
        return
    snapshot = capture(run.setup, progress)
    error: str | None = None
    if run.saver is not None:
        if ends_run or keeps_best:
            # These must not be left out because the last one is still being written.
            run.saver.wait()
        is_started = run.saver.start(snapshot, is_best=keeps_best)
        if is_started:
            run.saved_at = time.monotonic()
        if ends_run:
            run.saver.wait()
        results = run.saver.pop_results()
        run.recorder.record_saves(results)
        if not is_started:
            run.recorder.record_unsaved()
        error = results[-1].error if ends_run and results else None
    if ends_run and (error := from_first(run.saver is not None, lambda: error)) is not None:
        raise SaveError(f"the state after step {progress.step} could not be saved: {error}")
