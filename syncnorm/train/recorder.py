"""What is written down and shown of a run while it goes on."""

import logging
import time
from pathlib import Path
from typing import Any, Self

import torch

from syncnorm import monitor
from syncnorm.comm import exchange
from syncnorm.errors import ConfigError
from syncnorm.train.checkpoint.progress import Position
from syncnorm.train.checkpoint.saver import SaveResult
from syncnorm.train.display import Display
from syncnorm.train.metrics import MetricsFile
from syncnorm.train.setup import Learner
from syncnorm.train.step import StepResult

_log = logging.getLogger(__name__)

PROFILED_STEPS = 5


class Follower:
    """Follow a run: events to `metrics.jsonl`, figures to the screen, all of it by the first
    worker.

    Every worker has one, as records of the normalisation layers are pooled.

    Args:
        learner: what is trained.
        folder: the run's.
        position: of the run.
        total_steps: of the whole run.
    """

    def __init__(
        self, learner: Learner, folder: Path, position: Position, total_steps: int
    ) -> None:
        self._config = learner.config.follow
        self._is_first = learner.workers.is_first
        self._position = position
        self._total_steps = total_steps
        self.metrics = MetricsFile(folder / "metrics.jsonl" if self._is_first else None)
        self.display = Display(total_steps, done=position.step, quiet=not self._is_first)
        self._board = _open_board(folder) if self._config.tensorboard and self._is_first else None
        self._monitor = monitor(learner.model) if self._config.layers else None
        self._profile = _Profile(self._config.profile, folder, learner.workers.rank)
        self._tally = exchange.Tally()
        self._samples = 0
        self._since = self._epoch_since = time.perf_counter()

    def __enter__(self) -> Self:
        self.display.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._profile.stop()
        self.display.__exit__()
        if self._board is not None:
            self._board.close()

    def after_step(self, result: StepResult, samples: int, rate: float) -> None:
        """Record a step. *Collectives*: every `follow.every` steps those of
        `monitor(model).read()`.
        """
        step = self._position.step
        self._samples += samples
        extra = {} if result.grad_norm is None else {"grad_norm": result.grad_norm}
        self.metrics.write("step", step=step, loss=result.loss, lr=rate, **extra)
        self.display.advance(step, result.loss)
        self._profile.step(step)
        if step % self._config.every == 0:
            self._interval(result, rate)

    def _interval(self, result: StepResult, rate: float) -> None:
        seconds = time.perf_counter() - self._since
        waited = sum(total.seconds for total in self._tally.take().values())
        speed = {
            "samples_per_second": self._samples / seconds,
            "exchange_share": min(1.0, waited / seconds),
            "seconds": seconds,
        }
        step = self._position.step
        self.metrics.write_timed("interval", step=step, **speed)
        self._plot(step, loss=result.loss, lr=rate, **speed)
        self.display.show_speed(
            speed["samples_per_second"], speed["exchange_share"], self._position.test_accuracy
        )
        if self._monitor is not None:
            self.metrics.write("layers", step=step, **self._monitor.read())
        self._samples, self._since = 0, time.perf_counter()

    def after_epoch(self, mean_loss: float, rate: float, epochs: int) -> None:
        """Record an epoch and its evaluation."""
        position, seconds = self._position, time.perf_counter() - self._epoch_since
        self._epoch_since = time.perf_counter()
        assert position.test_accuracy is not None
        self.metrics.write_timed(
            "epoch",
            epoch=position.epoch,
            step=position.step,
            loss=mean_loss,
            test_accuracy=position.test_accuracy,
            lr=rate,
            seconds=seconds,
        )
        self._plot(position.step, test_accuracy=position.test_accuracy)
        self.display.say(
            f"epoch {position.epoch}/{epochs}  step {position.step}  loss {mean_loss:.4f}"
            f"  test accuracy {100 * position.test_accuracy:.2f} %  lr {rate:.3g}  {seconds:.2f} s"
        )

    def fault(self, kind: str, message: str) -> None:
        """Record that something went wrong, and say it."""
        _log.info("%s", message)
        self.metrics.write_timed("fault", step=self._position.step, kind=kind, message=message)
        self.display.say(message)

    def saved(self, results: list[SaveResult]) -> None:
        """Record what became of saves."""
        for result in results:
            if result.path is None:
                self.fault(
                    "checkpoint",
                    f"the checkpoint of step {result.step} was not saved: {result.error}",
                )
            else:
                self.metrics.write_timed(
                    "checkpoint", step=result.step, path=result.path.name, seconds=result.seconds
                )

    def _plot(self, step: int, **values: float) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


def _open_board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"`follow.tensorboard` must be false where TensorBoard is not installed: {error}. "
            "Install it with: pip install 'syncnorm[tensorboard]'"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"))


class _Profile:
    """torch.profiler over a few steps of one worker."""

    def __init__(self, first: int | None, folder: Path, rank: int) -> None:
        self._first = first
        self._path = folder / "profile" / f"rank-{rank}.json"
        self._profiler: torch.profiler.profile | None = None
        self._last = 0

    def step(self, done: int) -> None:
        """Begin before step `first`, end PROFILED_STEPS later."""
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
