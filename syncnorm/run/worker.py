"""One worker of a run, under any launcher: joins the others, trains, records the end."""

import gc
import logging
import os
import shlex
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from syncnorm.errors import ConfigError, in_one_line
from syncnorm.run.ending import Exit
from syncnorm.run.entering import open_run_folder
from syncnorm.run.env import Launched, read_launched, writes_report
from syncnorm.run.errors import RESUMABLE
from syncnorm.run.folder import write_config
from syncnorm.run.in_process import ends_are_errors
from syncnorm.run.joining import join, meet
from syncnorm.run.request import RunRequest, uses_store
from syncnorm.run.watchdog import SignalWatch, open_log
from syncnorm.system import die_with_parent, flush_streams, tell
from syncnorm.train.checkpoint.capture import Progress
from syncnorm.train.config.schema import Config
from syncnorm.train.header import describe_workers
from syncnorm.train.loop import Outcome, Watch, train
from syncnorm.train.metrics import MetricsFile, last_step
from syncnorm.train.report import write_own_report
from syncnorm.train.storage.mirror import Mirror, open_mirror
from syncnorm.train.task.measures import describe_metrics
from syncnorm.train.waiting import in_thread_of_first, wait_for_first
from syncnorm.train.workers import Workers

_log = logging.getLogger(__name__)

# For the copy of a run that has failed, which the other workers do not wait for.
_LAST_COPY_SECONDS = 5.0
# Of a digest; all of them are in metrics.jsonl.
_SHOWN_DIGITS = 16


def run_launched(request: RunRequest) -> NoReturn:
    """Train as the rank that the environment names, and end this process."""
    launched = read_launched()
    assert launched is not None
    run_worker(request, launched)


def run_worker(request: RunRequest, launched: Launched) -> NoReturn:
    """Train by `work`, and end this process with the status of the command."""
    end_with(partial(work, request, launched), launched)


def end_with(work: Callable[[], int | None], launched: Launched) -> NoReturn:
    """Work as one worker, and end this process with the status of the command.

    Args:
        work: under torch's `record`; returns the status.
        launched: by whom.
    """
    try:
        status = work() or 0
    except Exception as error:
        if launched.launcher_pid is None and not isinstance(error, ConfigError):
            raise
        # Our own launcher reads the worker's error file and prints the cause once, not once per
        # worker.
        if launched.launcher_pid is None and launched.rank == 0:
            tell(f"syncnorm: {error}")
        status = 2 if isinstance(error, ConfigError) else 1
    with suppress(OSError):
        flush_streams()
    # Not sys.exit: DDP keeps the process group alive, and a thread of gloo that releases its last
    # message while the interpreter shuts down aborts the process, in one run of 15.
    os._exit(status)


@record
def work(request: RunRequest, launched: Launched) -> int:
    """Train as the rank that the launcher gave this process.

    Returns:
        The exit status: 0 done, 75 stopped and saved.
    """
    return 0 if _work(request, launched)[1].is_done else RESUMABLE


def work_in_program(request: RunRequest, launched: Launched) -> tuple[Path, Exit]:
    """Train as `work` does, in a process that goes on afterwards.

    Returns:
        The run's folder and the record of its end.
    """
    try:
        folder, outcome = _work(request, launched, stays=True)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        # DDP holds the process group alive, and would end it with the interpreter.
        gc.collect()
    return folder, _exit_record(outcome)


def _work(request: RunRequest, launched: Launched, *, stays: bool = False) -> tuple[Path, Outcome]:
    # Elsewhere than on Linux, the workers of a launcher that is killed outright end by the timeouts
    # of their collectives.
    die_with_parent(launched.launcher_pid)
    workers = join(request.config.launch.device, launched, request.config.timeout_seconds)
    with open_run_folder(request, launched) as named:
        # Code of the user's may change the working folder.
        folder = named.absolute()
        if uses_store(request):
            # The machines need have no folder in common.
            folder.mkdir(parents=True, exist_ok=True)
        open_log(folder / "logs" / f"rank-{workers.rank}.log", workers.is_first)
        if workers.is_first and launched.launcher_pid is None and request.shows:
            # Our own launcher has printed it before this process was there.
            tell(describe_workers(workers.world_size, workers.device))
        watch = SignalWatch(
            request.config.timeout_seconds, folder / "logs" / f"stacks-{workers.rank}.txt"
        )
        # From here on the folder may be removed: all workers have made their files in it.
        meet(workers)
        try:
            outcome = train_in(folder, request, workers, watch)
        finally:
            watch.close()
            if stays:
                watch.leave_signals()
        if workers.is_first and request.prints:
            tell("\n".join([*summarize(outcome), str(named)]), is_result=True)
            if outcome.is_done:
                command = shlex.join(["syncnorm", "report", str(named)])
                has_page = (folder / "report.html").exists()
                tell(f"To see it: {named / 'report.html' if has_page else command}")
        # A peer may still be completing the last collective.
        meet(workers)
    dist.destroy_process_group()
    return named, outcome


def train_in(folder: Path, request: RunRequest, workers: Workers, watch: Watch) -> Outcome:
    """Train in a run's folder, and record the end in `exit.json`.

    Args:
        folder: from `open_run_folder`.
        request: the same on all workers.
        workers: this worker's place.
        watch: gets the progress, and may ask to stop.
    """
    _log.info("worker %d of %d on %s", workers.rank, workers.world_size, workers.device)
    progress, config = Progress(), request.config
    mirror: Mirror | None = None
    has_begun = False

    def begin() -> None:
        nonlocal has_begun
        _begin(config, folder)
        has_begun = True

    if workers.is_first:
        mirror = open_mirror(folder, config.checkpoint.keep, config.launch.patience_seconds)
    try:
        # A program may have switched gradients off.
        with ends_are_errors(), torch.inference_mode(False), torch.enable_grad():
            callbacks = request.given.give()
            outcome = train(
                config,
                workers,
                folder,
                progress,
                watch,
                request.allowed,
                callbacks,
                begin=begin,
                mirror=mirror,
                shows=request.shows,
            )
    except Exception as error:
        _log.info("failed after step %d", progress.step, exc_info=True)
        # A run that is refused before it goes on stays as it was, in its store, too.
        is_refused = isinstance(error, ConfigError) and not has_begun
        if workers.is_first and not is_refused:
            _record_failure(error, folder, progress)
            if mirror is not None and (folder / "metrics.jsonl").exists():
                mirror.close()
                mirror.is_over(_LAST_COPY_SECONDS)
        raise
    if workers.is_first:
        _exit_record(outcome).write(folder)
    if outcome.is_done:
        _write_page(folder, workers, watch)
    _finish_copy(mirror, folder, outcome.step, watch)
    return outcome


def _record_failure(error: Exception, folder: Path, progress: Progress) -> None:
    """Write `exit.json`, unless the disk is full, which may be what the error is of."""
    code = 2 if isinstance(error, ConfigError) else 1
    with suppress(OSError):
        # A resumed run that fails early has not read its checkpoint.
        step = max(progress.step, last_step(folder / "metrics.jsonl"))
        Exit("failed", in_one_line(error), step, code).write(folder)


def _begin(config: Config, folder: Path) -> None:
    """Make the configuration that of the folder: a resumed run may have more epochs, or other workers."""
    try:
        write_config(config, folder)
    except OSError as error:
        raise ConfigError(
            f"run {str(folder)!r} must be writable, its config.yaml too: {error.strerror}"
        ) from None


def _write_page(folder: Path, workers: Workers, watch: Watch) -> None:
    """Write the run's page, on the first worker, while all of them stay alive.

    *Collectives*: a broadcast or more; every worker must call.
    """
    is_written_here = workers.is_first and writes_report()
    in_thread_of_first(partial(write_own_report, folder) if is_written_here else None, watch.alive)


def _finish_copy(mirror: Mirror | None, folder: Path, step: int, watch: Watch) -> None:
    """Copy what is left to the run's address, and wait for that, but not if nothing moves.

    *Collectives*: a broadcast or more; every worker must call.
    """
    if mirror is not None:
        mirror.close()
    wait_for_first(None if mirror is None else mirror.is_over, watch.alive)
    for fault in [] if mirror is None else mirror.pop_faults():
        _log.warning("%s", fault)
        MetricsFile(folder / "metrics.jsonl").write_timed(
            "fault", step=step, kind="storage", message=fault
        )


def _exit_record(outcome: Outcome) -> Exit:
    metrics = {split: dict(each) for split, each in outcome.metrics.items()}
    if outcome.is_done:
        return Exit("done", outcome.reason, outcome.step, 0, metrics)
    return Exit("stopped", f"{outcome.reason}; saved", outcome.step, RESUMABLE, metrics)


def summarize(outcome: Outcome) -> list[str]:
    """Describe the result of a run for the user; the last line is the metric that decides."""
    if not outcome.is_done:
        return ["stopped, saved"]
    count, different = len(outcome.digests), len(set(outcome.digests))
    if different == 1:
        equal = "" if count == 1 else f"equal on {count} workers, "
        lines = [f"running statistics: {equal}sha256 {outcome.digests[0][:_SHOWN_DIGITS]}"]
    else:
        lines = [
            f"running statistics: different on {different} of {count} workers",
            "each worker judged its share of the samples by its own; the checkpoint holds those "
            "of worker 0",
        ]
    return [*lines, *describe_metrics(outcome.metrics)]
