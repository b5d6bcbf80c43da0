"""One worker of a Ray job: the trainer, in a thread of a Ray actor."""

import logging
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from syncnorm.errors import ConfigError, ExchangeError, InputError, SyncnormError
from syncnorm.run.entering import open_run_folder
from syncnorm.run.env import read_launched
from syncnorm.run.errors import RESUMABLE
from syncnorm.run.failures import is_peer_loss
from syncnorm.run.joining import join, meet
from syncnorm.run.ray.job import STOP, Job
from syncnorm.run.watchdog import Watchdog, open_log
from syncnorm.run.worker import summarize, train_in
from syncnorm.system import tell
from syncnorm.train.header import describe_workers

# The controller puts a file of this name into the run's folder: save and end, for the number of
# workers is to change.
RESIZE = "RESIZE"
TRACEBACK = "traceback.txt"

# To look into a folder on a network takes time.
_LOOK_SECONDS = 0.2

_log = logging.getLogger(__name__)


class WorkerLost(SyncnormError):
    """The connection to a peer was lost. Ray restarts the workers."""


@dataclass(frozen=True)
class WorkerResult:
    """Result of a worker that lost no peer; equal on all workers.

    Args:
        exit_code: 0 done, 75 stopped and saved, 1 failed, 2 bad input.
        lines: to be printed.
    """

    exit_code: int
    lines: list[str]


class RayWatch(Watchdog):
    """Implementation of `syncnorm.train.loop.Watch` for a thread of a Ray actor.

    It gets no signals: a file in the run's folder asks to stop, or Ray announces that a node is to
    be preempted.

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
        """Reason to stop; None while there is none."""
        now = time.monotonic()
        if self._asked is None and now - self._looked > _LOOK_SECONDS:
            self._looked = now
            self._asked = self._stop_reason()
        return self._asked

    def _stop_reason(self) -> str | None:
        if (self._folder / STOP).exists():
            return "syncnorm stop"
        if (self._folder / RESIZE).exists():
            return "Ray, to change the number of workers"
        return "Ray, which is to lose a node" if _is_node_leaving() else None


def work(loop_config: dict[str, Any]) -> dict[str, Any]:
    """Train as the rank that Ray gave this thread.

    An error that all workers share is returned, since Ray retries after whatever is raised.

    Args:
        loop_config: `job`, as JSON.

    Returns:
        A `WorkerResult` as a dict.

    Raises:
        WorkerLost: the connection to a peer was lost; Ray retries.
        Exception: code failed on this worker. The traceback is written into the run's folder; the
            next attempt ends at once.
    """
    job = Job.from_json(loop_config["job"])
    folder = Path(job.folder)
    if (folder / TRACEBACK).exists():
        return asdict(WorkerResult(1, []))
    try:
        return asdict(_train(job, folder))
    except Exception as error:
        if is_peer_loss(f"{type(error).__name__}: {error}"):
            raise WorkerLost(str(error)) from None
        # These may be of one worker alone, which must end, for the others wait for it.
        if isinstance(error, SyncnormError) and not isinstance(error, InputError | ExchangeError):
            return asdict(WorkerResult(2 if isinstance(error, ConfigError) else 1, [str(error)]))
        _write_traceback(folder, error)
        raise


def _train(job: Job, folder: Path) -> WorkerResult:
    launched = read_launched()
    assert launched is not None
    launched = replace(launched, run_folder=folder)
    request = job.request()
    config = request.config
    workers = join(config.launch.device, launched, config.timeout_seconds)
    with open_run_folder(request, launched):
        _detach_stderr()
        open_log(folder / "logs" / f"rank-{workers.rank}.log", workers.is_first)
        if workers.is_first:
            tell(describe_workers(workers.world_size, workers.device))
        watch = RayWatch(config.timeout_seconds, folder, workers.rank)
        try:
            outcome = train_in(folder, request, workers, watch)
        finally:
            watch.close()
        # A peer may still be completing the last collective.
        meet(workers)
    return WorkerResult(0 if outcome.is_done else RESUMABLE, summarize(outcome))


def _write_traceback(folder: Path, error: Exception) -> None:
    """Write the first worker's failure to a file; the others may only follow from it."""
    launched = read_launched()
    rank = "?" if launched is None else launched.rank
    try:
        with (folder / TRACEBACK).open("x", encoding="utf-8") as file:
            file.write(f"worker {rank} failed: {type(error).__name__}: {error}\n\n")
            file.writelines(traceback.format_exception(error))
    except FileExistsError:
        pass


def _detach_stderr() -> None:
    """Remove Ray's log handler: what it writes to standard error lands in the job's log."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if type(handler) is not logging.FileHandler:
            root.removeHandler(handler)


def _is_node_leaving() -> bool:
    """Return True if a node of these workers is to be preempted.

    Ray's public `ray.train.get_preemption_info` waits for all workers at each call. This reads its
    source on this worker alone; the stop flag in the step's all-reduce informs the others.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None
