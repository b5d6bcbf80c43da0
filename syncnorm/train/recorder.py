"""The record of a run while it goes on: metrics, figures on the screen, TensorBoard, a profile."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch

from syncnorm import monitor
from syncnorm.comm import exchange
from syncnorm.errors import ConfigError
from syncnorm.train.checkpoint.capture import Progress, Resumed, versions
from syncnorm.train.checkpoint.saver import SaveResult
from syncnorm.train.data.feed import Feed
from syncnorm.train.display import Display
from syncnorm.train.header import header
from syncnorm.train.metrics import MetricsFile
from syncnorm.train.setup import Setup
from syncnorm.train.step import StepResult
from syncnorm.train.task.measures import format_metric

_log = logging.getLogger(__name__)

PROFILED_STEPS = 5


class Recorder:
    """Writes events of a run to `metrics.jsonl` and figures to the screen, on the first worker.

    Every worker has one, as figures of the normalisation layers are pooled.

    Args:
        setup: the model and its optimizer.
        folder: the run's.
        progress: of the run.
        total_steps: of the whole run.
    """

    def __init__(self, setup: Setup, folder: Path, progress: Progress, total_steps: int) -> None:
        self._setup = setup
        self._config = setup.config.follow
        self._is_first = setup.workers.is_first
        self._folder = folder
        self._progress = progress
        self._metrics = MetricsFile(folder / "metrics.jsonl" if self._is_first else None)
        self._display = Display(
            total_steps,
            done=progress.step,
            is_pooled=setup.workers.world_size > 1,
            quiet=not self._is_first,
        )
        self._tensorboard = None
        if self._config.tensorboard and self._is_first:
            self._tensorboard = _open_tensorboard(folder)
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
        if self._tensorboard is not None:
            self._tensorboard.close()

    def record_start(self, resumed: Resumed, feed: Feed) -> None:
        """Record the start of this process, and where it resumes from; print what is trained."""
        workers = self._setup.workers
        for line in header(self._setup, feed, self._folder):
            self._display.print_line(line)
        self._metrics.write_timed(
            "start",
            step=self._progress.step,
            world_size=workers.world_size,
            device=str(workers.device.type),
            resumed_from=resumed.source,
            versions=versions(),
            parameters=sum(parameter.numel() for parameter in self._setup.model.parameters()),
            placement=self._setup.describe_step(),
            decides=self._setup.task.best,
        )
        if resumed.source is not None:
            self._display.print_line(
                f"resumed from {resumed.source} on {workers.world_size} worker(s)"
            )
        for fault in resumed.faults:
            self.record_fault("checkpoint", fault)

    def record_end(
        self, metrics: dict[str, dict[str, float]], digests: list[str], *, is_done: bool
    ) -> None:
        """Record that the run is done, or was stopped, with the last metrics of each split."""
        self._metrics.write_timed(
            "end" if is_done else "stop",
            step=self._progress.step,
            digests=digests,
            **{key: v for split, each in metrics.items() for key, v in _named(split, each).items()},
        )

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
        if step % self._config.every == 0:
            self._record_interval(result, lr)

    def _record_interval(self, result: StepResult, lr: float) -> None:
        seconds = time.perf_counter() - self._since
        waited = sum(total.seconds for total in self._tally.take().values())
        speed = {
            "samples_per_second": self._samples / seconds,
            "exchange_share": min(1.0, waited / seconds),
            "seconds": seconds,
        }
        step = self._progress.step
        self._metrics.write_timed("interval", step=step, **speed)
        self._plot(step, loss=result.loss, lr=lr, **speed)
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
        self._plot(progress.step, **metrics)
        epochs = self._setup.config.train.epochs
        self._display.print_line(
            f"epoch {progress.epoch}/{epochs}  step {progress.step}  loss {mean_loss:.4f}"
            f"{self._describe(split)}  lr {lr:.3g}  {seconds:.2f} s"
        )

    def record_evaluation(self, split: str | None) -> None:
        """Record an evaluation within an epoch."""
        step, metrics = self._progress.step, self._evaluated(split)
        self._metrics.write_timed("evaluation", step=step, **metrics)
        self._plot(step, **metrics)
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

    def _plot(self, step: int, **values: float) -> None:
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)


def _named(split: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Name metrics as the events do, such as `test_accuracy`."""
    return {f"{split}_{name}": value for name, value in metrics.items()}


def _open_tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"`follow.tensorboard` must be false where TensorBoard is not installed: {error}. "
            "Install it with: pip install 'syncnorm[tensorboard]'"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"))


class _Profile:
    """A trace of a few steps of one worker, by torch.profiler."""

    def __init__(self, first: int | None, folder: Path, rank: int) -> None:
        self._first = first
        self._path = folder / "profile" / f"rank-{rank}.json"
        self._profiler: torch.profiler.profile | None = None
        self._last = 0

    def step(self, done: int) -> None:
        """Start before step `first`, and stop PROFILED_STEPS later."""
        if self._first is None:
            return
        if self._profiler is None and done + 1 == max(self._first, 2):
            self._profiler, self._last = torch.profiler.profile(), done + PROFILED_STEPS
            self._profiler.start()
        elif self._profiler is not None and done == self._last:
            self.stop()

    def stop(self) -> None:
        """Write the trace, for chrome://tracing and Perfetto."""
        if self._profiler is not None:
            self._profiler.stop()
            self._path.parent.mkdir(exist_ok=True)
            self._profiler.export_chrome_trace(str(self._path))
            self._profiler, self._first = None, None
