"""One worker of a Ray job: the trainer, in a thread of a Ray actor."""

import logging
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from syncnorm.errors import ConfigError, SyncnormError
from syncnorm.run.env import read_launched
from syncnorm.run.failures import is_echo
from syncnorm.run.folder import RESUMABLE
from syncnorm.run.ray.job import STOP, Job
from syncnorm.run.watchdog import StuckLimit, open_log
from syncnorm.run.worker import enter_folder, join, summarize, train_in

# Asks the workers to save and end because their number is to change; put into the run's folder by
# the controller.
RESIZE = "RESIZE"
TRACEBACK = "traceback.txt"

# A look into a folder is not free where it is on a network.
_LOOK_SECONDS = 0.2

_log = logging.getLogger(__name__)


class WorkerLost(SyncnormError):
    """A worker lost its peer. Ray starts the workers again."""


@dataclass(frozen=True)
class Ended:
    """How a worker's part ended, if nothing was lost on the way; alike on all workers.

    Args:
        exit_code: 0 done, 75 stopped and saved, 1 failed, 2 bad input.
        lines: what a person is told.
    """

    exit_code: int
    lines: list[str]


class RayWatch(StuckLimit):
    """What a run asks and tells (see syncnorm.train.loop.Watch), as a thread of a Ray actor sees
    it.

    There are no signals: a file in the run's folder asks to stop, or Ray says that a node is to be
    taken away.

    Args:
        timeout_seconds: at least 1.
        folder: of the run.
        rank: of this worker.
    """

    def __init__(self, timeout_seconds: float, folder: Path, rank: int) -> None:
        super().__init__(timeout_seconds, folder / "logs" / f"stacks-{rank}.txt")
        self._asked: str | None = None
        self._folder = folder
        self._looked = 0.0

    @property
    def stop(self) -> str | None:
        """Why this worker was asked to stop, if it was."""
        now = time.monotonic()
        if self._asked is None and now - self._looked > _LOOK_SECONDS:
            self._looked = now
            self._asked = self._look()
        return self._asked

    def _look(self) -> str | None:
        if (self._folder / STOP).exists():
            return "syncnorm stop"
        if (self._folder / RESIZE).exists():
            return "Ray, to change the number of workers"
        return "Ray, which is to lose a node" if _is_node_leaving() else None


def work(loop_config: dict[str, Any]) -> dict[str, Any]:
    """Train as the worker that Ray says this thread is.

    What fails alike on all workers is returned, for Ray would try again whatever is raised.

    Args:
        loop_config: `job`, as text.

    Returns:
        An `Ended`, as plain data.

    Raises:
        WorkerLost: another worker is gone; to be tried again.
        Exception: code failed on this worker. The traceback is left in the run's folder; the next
            attempt ends at once.
    """
    job = Job.from_text(loop_config["job"])
    folder = Path(job.folder)
    if (folder / TRACEBACK).exists():
        return asdict(Ended(1, []))
    try:
        return asdict(_train(job, folder))
    except Exception as error:
        if is_echo(f"{type(error).__name__}: {error}"):
            raise WorkerLost(str(error)) from None
        if isinstance(error, SyncnormError):
            return asdict(Ended(2 if isinstance(error, ConfigError) else 1, [str(error)]))
        _leave_traceback(folder, error)
        raise


def _train(job: Job, folder: Path) -> Ended:
    launched = read_launched()
    assert launched is not None
    launched = replace(launched, run_folder=folder)
    task = job.task()
    launch = task.config.launch
    workers = join(launch.device, launched, launch.timeout_seconds)
    with enter_folder(task, launched):
        _leave_screen()
        open_log(folder / "logs" / f"rank-{workers.rank}.log", workers.is_first)
        watch = RayWatch(launch.timeout_seconds, folder, workers.rank)
        try:
            outcome = train_in(folder, task, workers, watch)
        finally:
            watch.close()
        # Others may still be at work for this one's last message.
        dist.barrier()
    return Ended(0 if outcome.is_done else RESUMABLE, summarize(outcome))


def _leave_traceback(folder: Path, error: Exception) -> None:
    """The first worker whose code fails says so; others may fail for no other reason than that."""
    launched = read_launched()
    rank = "?" if launched is None else launched.rank
    try:
        with (folder / TRACEBACK).open("x", encoding="utf-8") as file:
            file.write(f"worker {rank} failed: {type(error).__name__}: {error}\n\n")
            file.writelines(traceback.format_exception(error))
    except FileExistsError:
        pass


def _leave_screen() -> None:
    """Take Ray's handler off the log: what it writes to standard error comes to the job's log."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if type(handler) is not logging.FileHandler:
            root.removeHandler(handler)


def _is_node_leaving() -> bool:
    """Whether a node of these workers is to be taken away.

    Ray's public `ray.train.get_preemption_info` waits for all workers at each call. This reads what
    that one starts from, on this worker alone: the step's own exchange tells the others.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None
