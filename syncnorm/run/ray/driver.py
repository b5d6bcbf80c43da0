"""The driver of a Ray job, `python -m syncnorm.run.ray.driver JOB`: runs the workers by Ray Train.

Ray places the workers, watches them and restarts them. The trainer itself chooses the checkpoint
to resume from, the newest good one in the run's folder: Ray's record of checkpoints may be older
than the files on disk.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any, cast

import ray
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import LoggingConfig
from ray.train.v2.api.exceptions import ControllerError
from ray.util.state import list_actors

from syncnorm.errors import ConfigError
from syncnorm.run import env
from syncnorm.run.ending import Exit, read_exit
from syncnorm.run.entering import without_end
from syncnorm.run.errors import RESUMABLE
from syncnorm.run.folder import lock
from syncnorm.run.joining import GROUP_MARGIN_SECONDS
from syncnorm.run.ray.cluster import Capacity, check_capacity, read_capacity, read_reserved
from syncnorm.run.ray.job import STOP, Job, make_job, prepare_folder
from syncnorm.run.ray.resize import SaveBeforeResize
from syncnorm.run.ray.worker import RESIZE, TRACEBACK, WorkerResult, work
from syncnorm.train.config.file import load_config
from syncnorm.train.config.schema import Config
from syncnorm.train.files import open_to_write
from syncnorm.train.metrics import last_step
from syncnorm.train.task.measures import describe_metrics

# Polls, a second apart, that must find no worker before a stopped job counts as having none.
_LOOKS = 3


def main(arguments: Sequence[str]) -> int:
    """Run a job and return its exit status.

    Args:
        arguments: a job as JSON; or a configuration and overrides, for `launch/ray_train.py`.
    """
    try:
        is_job = len(arguments) == 1 and arguments[0].startswith("{")
        return run_job(Job.from_json(arguments[0]) if is_job else _job_of(arguments))
    except ConfigError as error:
        print(f"syncnorm: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _job_of(arguments: Sequence[str]) -> Job:
    if not arguments:
        raise ConfigError(
            "`CONFIG` must be a YAML file or the name of a packed configuration, got nothing"
        )
    return make_job(arguments[0], arguments[1:], ())


def run_job(job: Job) -> int:
    """Train on the cluster that this process is in.

    Returns:
        The exit status: 0 done, 1 failed, 75 stopped and saved.

    Raises:
        ConfigError: the cluster is too small, or the run's folder does not fit, or the workers
            refuse, or another driver runs it; the run's record of its last end is as it was.
    """
    env.set_for_ray_driver()
    epochs = _recorded_epochs(Path(job.folder))
    folder = prepare_folder(job)
    has_more = epochs is not None and job.request().config.train.epochs > epochs
    with closing(lock(folder, "driver.lock")):  # a running one needs its STOP
        if (end := read_exit(folder)) is not None and end.status == "done" and not has_more:
            print("\n".join([*_describe_done(end), str(folder)]))
            return 0
        with without_end(folder):
            return _run(job, folder)


def _run(job: Job, folder: Path) -> int:
    for name in (STOP, RESIZE, TRACEBACK):
        (folder / name).unlink(missing_ok=True)
    ray.init(address="auto", logging_level=logging.WARNING)
    config = job.request().config
    capacity = read_capacity(config, read_reserved(job.submission_id))
    check_capacity(config, capacity)
    stopping = StopHandler(folder)
    code = _fit_until_done(job, config, capacity, folder, stopping)
    stopping.is_over = True
    return code


def _recorded_epochs(folder: Path) -> int | None:
    """Read how long the run in a folder was to be; None if there is none."""
    try:
        return load_config(str(folder / "config.yaml")).train.epochs
    except ConfigError:
        return None


def _describe_done(end: Exit) -> list[str]:
    begin = f"done already, after step {end.step}; --id NEW runs it again"
    return [begin, *describe_metrics(end.metrics)]


def _fit_until_done(
    job: Job, config: Config, capacity: Capacity, folder: Path, stopping: "StopHandler"
) -> int:
    lost = 0
    while True:
        try:
            result = _trainer(job, config, capacity, folder).fit()
        except ControllerError as error:
            if type(error.controller_failure).__name__ != "WorkerGroupStartupTimeoutError":
                return _fail(f"Ray: {error.controller_failure}", folder)
            print(
                f"syncnorm: waiting for room for {config.launch.fewest_workers} worker(s)",
                file=sys.stderr,
            )
        except TrainingFailedError as error:
            # With no restart left no worker is started that would find it.
            if (folder / TRACEBACK).exists():
                return _report_result(WorkerResult(1, []), folder)
            return _fail(_reason(error, config), folder)
        except RayActorError as error:
            lost += 1
            if lost > config.launch.restarts:
                return _fail(
                    f"Ray's controller was lost {lost} time(s), the last time {error}", folder
                )
            print("syncnorm: Ray's controller was lost; starting again", file=sys.stderr)
        else:
            ended = WorkerResult(**cast(dict[str, Any], result.return_value))
            if ended.exit_code == RESUMABLE and not (folder / STOP).exists():
                print(
                    f"syncnorm: saved after step {_step(folder)} on Ray's notice; starting again",
                    file=sys.stderr,
                )
                continue
            return _report_result(ended, folder)
        if stopping.is_asked:
            return _stop_status(folder)


def _trainer(job: Job, config: Config, capacity: Capacity, folder: Path) -> TorchTrainer:
    launch = config.launch
    workers = (
        launch.fewest_workers
        if launch.fewest_workers == launch.most_workers
        else (launch.fewest_workers, launch.most_workers)
    )
    return TorchTrainer(
        work,
        train_loop_config={"job": job.to_json()},
        torch_config=TorchConfig(
            backend="nccl" if capacity.is_gpu else "gloo",
            timeout_s=round(config.timeout_seconds + GROUP_MARGIN_SECONDS),
        ),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=capacity.is_gpu,
            resources_per_worker=capacity.per_worker,
            placement_strategy="SPREAD",
        ),
        run_config=RunConfig(
            # Ray notices there whether all machines have the folder in common.
            name="ray",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=launch.restarts, controller_failure_limit=3),
            callbacks=[cast(UserCallback, SaveBeforeResize(folder, launch.patience_seconds))],
            worker_runtime_env={"env_vars": env.ray_worker_environment()},
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )


class StopHandler:
    """Handler that passes SIGTERM, which `ray job stop` sends to this process only, to the workers.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.is_asked: bool = False
        self.is_over: bool = False
        self._folder = folder
        # After ray.init, which installs a handler of its own.
        signal.signal(signal.SIGTERM, self._handle_signal)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.is_asked:
            self.is_asked = True
            open_to_write(self._folder / STOP).close()
            threading.Thread(target=self._end_without_workers, daemon=True).start()

    def _end_without_workers(self) -> None:
        """End this process if there are no workers that could: Ray has not placed them yet."""
        looks = 0
        while looks < _LOOKS:
            time.sleep(1)
            looks = looks + 1 if _count_workers() == 0 else 0
        if not self.is_over:
            os._exit(_stop_status(self._folder))


def _count_workers() -> int:
    """Count the live workers of this job."""
    mine = ray.get_runtime_context().get_job_id()
    try:
        return len(
            list_actors(
                filters=[
                    ("job_id", "=", mine),
                    ("class_name", "=", "RayTrainWorker"),
                    ("state", "=", "ALIVE"),
                ]
            )
        )
    except Exception:  # whatever keeps the cluster from answering; it may be at its end
        return 1


def _stop_status(folder: Path) -> int:
    """Return the exit status of a stopped run, as its workers recorded it if there were any."""
    end = read_exit(folder)
    if end is None:
        reason = "asked to stop by syncnorm stop; no worker was running"
        end = Exit("stopped", reason, _step(folder), RESUMABLE)
        end.write(folder)
    return end.exit_code


def _report_result(ended: WorkerResult, folder: Path) -> int:
    """Print the end of the run, make sure it is recorded, and return the exit status.

    Raises:
        ConfigError: the workers refused; there is no end to record.
    """
    traceback = folder / TRACEBACK
    if traceback.exists():
        return _fail(
            traceback.read_text(encoding="utf-8").partition("\n")[0], folder, where=traceback
        )
    if ended.exit_code in (0, RESUMABLE):
        print("\n".join([*ended.lines, str(folder)]))
        return ended.exit_code
    reason = "; ".join(ended.lines)
    if ended.exit_code == 2:
        raise ConfigError(reason)
    return _fail(reason, folder)


def _reason(error: TrainingFailedError, config: Config) -> str:
    failures = getattr(error, "worker_failures", {})
    lost = "; ".join(
        f"worker {rank}: {' '.join(str(each).split())[:200]}"
        for rank, each in sorted(failures.items())
    )
    return f"workers were lost {config.launch.restarts + 1} time(s), the last time {lost or error}"


def _fail(reason: str, folder: Path, where: Path | None = None) -> int:
    Exit("failed", reason, _step(folder), 1).write(folder)
    # On one line: its prefix tells `syncnorm submit` that it is no result.
    print(f"syncnorm: {' '.join(reason.split())}; {where or folder}", file=sys.stderr)
    return 1


def _step(folder: Path) -> int:
    return last_step(folder / "metrics.jsonl")


if __name__ == "__main__":
    # Under its own name: Ray sends a function of `__main__` by value, with all that it refers to.
    from syncnorm.run.ray import driver

    sys.exit(driver.main(sys.argv[1:]))
