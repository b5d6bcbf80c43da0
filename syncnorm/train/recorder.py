"""The record of a run while it goes on: metrics, the screen, loggers, a profile."""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch

from syncnorm import monitor
from syncnorm.comm import exchange
from syncnorm.train.checkpoint.capture import Progress, Resumed, versions
from syncnorm.train.checkpoint.saver import SaveResult
from syncnorm.train.data.feed import Feed
from syncnorm.train.display import Display
from syncnorm.train.header import header
from syncnorm.train.loggers import open_loggers
from syncnorm.train.loggers.guarded import GuardedLogger
from syncnorm.train.memory import peak_memory
from syncnorm.train.metrics import MetricsFile
from syncnorm.train.setup import Setup
from syncnorm.train.step import StepResult
from syncnorm.train.storage.mirror import Mirror
from syncnorm.train.task.measures import format_metric
from syncnorm.train.waiting import from_first, wait_for_first

_log = logging.getLogger(__name__)

PROFILED_STEPS = 5
# For loggers at the end of a run: that is done, that is asked to stop and may be killed soon, and
# that ends by an error, which the other workers do not wait for.
_DONE_SECONDS, _STOP_SECONDS, _ERROR_SECONDS = 120.0, 15.0, 2.0


class Recorder:
    """Writes events of a run to `metrics.jsonl` and figures to the screen, on the first worker.

    Every worker has one, as figures of the normalisation layers are pooled.

    *Collectives*: where there are loggers, a broadcast; every worker must call.

    Args:
        setup: the model and its optimizer.
        folder: the run's.
        progress: of the run.
        total_steps: of the whole run.
        allowed: packages whose loggers the configuration may name.
        mirror: copies the run's folder to its store; on the first worker, if it has one.
        shows: True to show the run on the screen.

    Raises:
        ConfigError: a logger's package is missing, or its class; on all workers.
    """

    def __init__(
        self,
        setup: Setup,
        folder: Path,
        progress: Progress,
        total_steps: int,
        allowed: tuple[str, ...] = (),
        *,
        mirror: Mirror | None = None,
        shows: bool = True,
    ) -> None:
        self._setup = setup
        self._config = setup.config.follow
        self._is_first = setup.workers.is_first
        self._folder = folder
        self._progress = progress
        self._total_steps = total_steps
        self._metrics = MetricsFile(folder / "metrics.jsonl" if self._is_first else None)
        self._display = Display(
            total_steps,
            done=progress.step,
            is_pooled=setup.workers.world_size > 1,
            quiet=not (shows and self._is_first),
        )
        self._name = setup.config.name or folder.name
        self._mirror = mirror
        self._loggers = _open_on_first(setup, folder, allowed) if self._config.loggers else []
        self._monitor = monitor(setup.model) if self._config.layers else None
        self._profile = _Profile(self._config.profile, folder, setup.workers.rank)
        self._tally = exchange.Tally()
        self._samples = 0
        self._since = self._epoch_since = time.perf_counter()

    def __enter__(self) -> Self:
        self._display.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._profile.stop()
        self._display.__exit__()
        for logger in self._loggers:
            logger.close(_ERROR_SECONDS)
        for logger in self._loggers:
            logger.is_over(_ERROR_SECONDS)

    def record_start(self, resumed: Resumed, feed: Feed) -> None:
        """Record the start of this process, and where it resumes from; print what is trained."""
        workers = self._setup.workers
        for line in header(self._setup, feed, self._folder):
            self._display.print_line(line)
        self._metrics.write_timed(
            "start",
            step=self._progress.step,
            name=self._name,
            tags=self._setup.config.tags,
            world_size=workers.world_size,
            device=str(workers.device.type),
            resumed_from=resumed.source,
            versions=versions(),
            parameters=sum(parameter.numel() for parameter in self._setup.model.parameters()),
            placement=self._setup.describe_step(),
            steps=self._total_steps,
            decides=self._setup.task.best,
        )
        if resumed.source is not None:
            self._display.print_line(
                f"resumed from {resumed.source} on {workers.world_size} worker(s)"
            )
        if self._mirror is not None:
            self._display.print_line(f"copied to {self._mirror.url}")
            self._mirror.request()
        for fault in resumed.faults:
            self.record_fault("checkpoint", fault)

    def record_end(
        self,
        metrics: dict[str, dict[str, float]],
        digests: list[str],
        judged: str | None,
        *,
        is_done: bool,
    ) -> None:
        """Record that the run is done, or was stopped, with the last metrics of each split.

        Args:
            metrics: by the name of the split.
            digests: of the model's state, for each worker.
            judged: the split of the evaluations on the way, which loggers have.
            is_done: False if the run was stopped.
        """
        step = self._progress.step
        figures = {split: _named(split, each) for split, each in metrics.items()}
        flat = {name: value for each in figures.values() for name, value in each.items()}
        self._metrics.write_timed("end" if is_done else "stop", step=step, digests=digests, **flat)
        for split in figures.keys() - {judged}:
            self._log(step, figures[split])

    def close_loggers(self, alive: Callable[[], None], *, is_done: bool) -> None:
        """Let the loggers send what they have, and wait for them, not for ever.

        *Collectives*: where there are loggers, broadcasts; every worker must call.

        Args:
            alive: called meanwhile.
            is_done: False if the run was asked to stop.
        """
        if not self._config.loggers:
            return
        for logger in self._loggers:
            logger.close(_DONE_SECONDS if is_done else _STOP_SECONDS)
        for number in range(len(self._config.loggers)):
            wait_for_first(self._loggers[number].is_over if self._is_first else None, alive)
        self._record_others_faults()

    def record_predictions(self, predictions: dict[str, Any] | None) -> None:
        """Record what `collect_predictions` has found, if anything."""
        if predictions is not None:
            self._metrics.write("predictions", step=self._progress.step, **predictions)

    def record_step(self, result: StepResult, samples: int, lr: float) -> None:
        """Record a step.

        *Collectives*: every `follow.every` steps those of `monitor(model).read()`.
        """
        step = self._progress.step
        self._samples += samples
        extra = {} if result.grad_norm is None else {"grad_norm": result.grad_norm}
        self._metrics.write("step", step=step, loss=result.loss, lr=lr, **extra)
        self._display.advance(step, result.loss)
        self._profile.step(step)
        self._record_others_faults()
        if step % self._config.every == 0:
            self._record_interval(result, lr)

    def _record_interval(self, result: StepResult, lr: float) -> None:
        seconds = time.perf_counter() - self._since
        waited = sum(total.seconds for total in self._tally.take().values())
        speed = {
            "samples_per_second": self._samples / seconds,
            "exchange_share": min(1.0, waited / seconds),
            "seconds": seconds,
            "memory": peak_memory(self._setup.workers.device),
        }
        step = self._progress.step
        self._metrics.write_timed("interval", step=step, **speed)
        self._log(step, {"loss": result.loss, "lr": lr, **speed})
        self._display.show_speed(speed["samples_per_second"], speed["exchange_share"])
        if self._monitor is not None:
            self._metrics.write("layers", step=step, **self._monitor.read())
        self._samples, self._since = 0, time.perf_counter()

    def record_epoch(self, mean_loss: float, lr: float, split: str | None) -> None:
        """Record an epoch, and the evaluation that it ends with.

        Args:
            mean_loss: of its steps.
            lr: of the last step.
            split: that was evaluated, if one was.
        """
        progress, seconds = self._progress, time.perf_counter() - self._epoch_since
        self._epoch_since = time.perf_counter()
        metrics = self._evaluated(split)
        self._metrics.write_timed(
            "epoch",
            epoch=progress.epoch,
            step=progress.step,
            loss=mean_loss,
            lr=lr,
            seconds=seconds,
            **metrics,
        )
        self._log(progress.step, metrics)
        epochs = self._setup.config.train.epochs
        self._display.print_line(
            f"epoch {progress.epoch}/{epochs}  step {progress.step}  loss {mean_loss:.4f}"
            f"{self._describe(split)}  lr {lr:.3g}  {seconds:.2f} s"
        )

    def record_evaluation(self, split: str | None) -> None:
        """Record an evaluation within an epoch."""
        step, metrics = self._progress.step, self._evaluated(split)
        self._metrics.write_timed("evaluation", step=step, **metrics)
        self._log(step, metrics)
        self._display.print_line(f"step {step}{self._describe(split)}")

    def _evaluated(self, split: str | None) -> dict[str, float]:
        return {} if split is None else _named(split, self._progress.metrics or {})

    def _describe(self, split: str | None) -> str:
        """Write the metric that decides, and is the first."""
        first = next(iter((self._progress.metrics or {}).items()), None)
        return "" if split is None or first is None else f"  {split} {format_metric(*first)}"

    def record_fault(self, kind: str, message: str, *, ends_run: bool = False) -> None:
        """Record that something went wrong, and print it unless the run ends with that message."""
        _log.info("%s", message)
        self._metrics.write_timed("fault", step=self._progress.step, kind=kind, message=message)
        if not ends_run:
            self._display.print_line(message)

    def record_unsaved(self) -> None:
        """Record that a checkpoint was left out, as the last one was still being written."""
        self._metrics.write_timed("unsaved", step=self._progress.step)

    def record_saves(self, results: list[SaveResult]) -> None:
        """Record saves that have ended, a failed one as a fault."""
        for result in results:
            if result.path is None:
                self.record_fault(
                    "checkpoint",
                    f"the checkpoint of step {result.step} was not saved: {result.error}",
                )
            else:
                self._metrics.write_timed(
                    "checkpoint", step=result.step, path=result.path.name, seconds=result.seconds
                )
                if self._mirror is not None:
                    self._mirror.request()

    def _log(self, step: int, figures: Mapping[str, float]) -> None:
        for logger in self._loggers:
            logger.log(step, figures)

    def _record_others_faults(self) -> None:
        """Record what loggers and the copying of the folder have come upon meanwhile."""
        for logger in self._loggers:
            for fault in logger.pop_faults():
                self.record_fault("logger", fault)
        for fault in self._mirror.pop_faults() if self._mirror is not None else ():
            self.record_fault("storage", fault)


def _named(split: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Name metrics as the events do, such as `test_accuracy`."""
    return {f"{split}_{name}": value for name, value in metrics.items()}


def _open_on_first(setup: Setup, folder: Path, allowed: tuple[str, ...]) -> list[GuardedLogger]:
    """Open the loggers on the first worker; an error is raised on all."""
    loggers: list[GuardedLogger] = []
    # They stay where they are: the others get nothing but the error.
    from_first(
        setup.workers.is_first, lambda: loggers.extend(open_loggers(setup.config, folder, allowed))
    )
    return loggers


class _Profile:
    """A trace of a few steps of one worker, by torch.profiler."""

    def __init__(self, first: int | None, folder: Path, rank: int) -> None:
        self._first = first
        self._path = folder / "profile" / f"rank-{rank}.json"
        self._is_first = rank == 0
        self._profiler: torch.profiler.profile | None = None
        self._last = self._done = 0

    def step(self, done: int) -> None:
        """Start before step `first`, and stop PROFILED_STEPS later."""
        self._done = done
        if self._first is None:
            return
        if self._profiler is None and done + 1 == max(self._first, 2):
            self._profiler, self._last = torch.profiler.profile(), done + PROFILED_STEPS
            self._profiler.start()
        elif self._profiler is not None and done == self._last:
            self.stop()

    def stop(self) -> None:
        """Write the trace, for chrome://tracing and Perfetto."""
        is_early = self._profiler is None and 0 < self._done < (self._first or 0)
        if is_early and self._is_first:
            _log.warning("follow.profile: step %d did not come, and there is no trace", self._first)
        if self._profiler is not None:
            self._profiler.stop()
            try:
                self._path.parent.mkdir(exist_ok=True)
                self._profiler.export_chrome_trace(str(self._path))
            except (OSError, RuntimeError) as error:  # a full disk
                _log.warning("the profile could not be written to %s: %s", self._path, error)
            self._profiler, self._first = None, None
