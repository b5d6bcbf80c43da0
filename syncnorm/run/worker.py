"""One worker of a run, under any launcher: joins the others, trains, records the end."""

import gc
import logging
import os
import secrets
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from syncnorm.errors import ConfigError, in_one_line
from syncnorm.run.ending import Exit
from syncnorm.run.env import Launched, read_launched, set_for_nccl, writes_report
from syncnorm.run.errors import RESUMABLE
from syncnorm.run.folder import (
    check_resumable,
    find_relaunched,
    lock,
    make_run_folder,
    remove_unstarted,
    write_config,
)
from syncnorm.run.given import Given
from syncnorm.run.in_process import ends_are_errors
from syncnorm.run.machine import choose_device
from syncnorm.run.watchdog import SignalWatch, open_log
from syncnorm.system import die_with_parent, flush_streams, tell
from syncnorm.train.checkpoint.capture import Progress
from syncnorm.train.config.schema import Config
from syncnorm.train.config.section import is_url
from syncnorm.train.economy import set_tf32
from syncnorm.train.header import describe_workers
from syncnorm.train.loop import Outcome, Watch, train
from syncnorm.train.metrics import MetricsFile, last_step
from syncnorm.train.report import write_own_report
from syncnorm.train.storage.mirror import Mirror, open_mirror
from syncnorm.train.task.measures import describe_metrics
from syncnorm.train.waiting import from_all, from_first, in_thread_of_first, wait_for_first
from syncnorm.train.workers import Workers

_log = logging.getLogger(__name__)

# The watchdog acts first, and writes the stacks of a stuck worker.
_GROUP_MARGIN_SECONDS = 30.0
# For the copy of a run that has failed, which the other workers do not wait for.
_LAST_COPY_SECONDS = 5.0
# On a network a new folder may take a while to show.
_VISIBLE_SECONDS = 5.0
# Of a digest; all of them are in metrics.jsonl.
_SHOWN_DIGITS = 16


@dataclass(frozen=True)
class RunRequest:
    """A run as the command line asks for it.

    Args:
        config: the same on all workers.
        name: of the configuration, for the run's folder.
        resume: the folder or the address of the run to resume; None for a new run.
        allowed: packages whose callables the configuration may name.
        given: objects of a program that the configuration names besides.
        shows: True to show the progress, on standard error.
        prints: True to print the result, on standard output.
    """

    config: Config
    name: str
    resume: Path | str | None = None
    allowed: tuple[str, ...] = ()
    given: Given = field(default_factory=Given)
    shows: bool = True
    prints: bool = True


def uses_store(request: RunRequest) -> bool:
    """Return True if the run's folder is copied to or from a store."""
    return is_url(request.config.run_dir) or is_url(str(request.resume))


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
        # A run that is refused before it goes on stays as it was.
        if workers.is_first and (has_begun or not isinstance(error, ConfigError)):
            code = 2 if isinstance(error, ConfigError) else 1
            reason = in_one_line(error)
            with suppress(OSError):  # a full disk, which may be what the error is of
                # A resumed run that is refused has not read its checkpoint.
                step = max(progress.step, last_step(folder / "metrics.jsonl"))
                Exit("failed", reason, step, code).write(folder)
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


def _begin(config: Config, folder: Path) -> None:
    """Make the configuration that of the folder: a resumed run may have more epochs, or other workers.

    The record of the end before is removed.
    """
    try:
        write_config(config, folder)
        (folder / "exit.json").unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run {str(folder)!r} must be writable, its {Path(str(error.filename)).name} too: "
            f"{error.strerror}"
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


def join(wanted_device: str, launched: Launched | None, timeout_seconds: float = 60.0) -> Workers:
    """Join the other workers, if there are any, in a default process group.

    Args:
        wanted_device: the configuration's `launch.device`.
        launched: this worker's rank; None for a single process.
        timeout_seconds: of collectives, and half a minute more; torch's default is half an hour.
    """
    rank, world_size, local = 0, 1, (0, 1)
    if launched is not None:
        rank, world_size, local = (
            launched.rank,
            launched.world_size,
            (launched.local_rank, launched.local_world_size),
        )
    device = choose_device(wanted_device, *local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        set_for_nccl()
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds + _GROUP_MARGIN_SECONDS)
    if dist.is_initialized():  # by Ray
        pass
    elif launched is None:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    return Workers(rank, world_size, device, local[1])


@contextmanager
def joined(config: Config, device: str, launched: Launched | None) -> Iterator[Workers]:
    """Join the other workers for work on a finished run, and leave them after the block.

    Args:
        config: of the run.
        device: auto, cpu or cuda.
        launched: this worker's rank; None for a single process.
    """
    workers = join(device, launched, config.launch.patience_seconds)
    set_tf32(config.train.tf32)
    try:
        yield workers
    finally:
        dist.destroy_process_group()


def meet(workers: Workers) -> None:
    """Wait until all workers are here. *Collectives*: a barrier; every worker must call."""
    # Of several devices NCCL would guess one, and warn.
    device = workers.device
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)


@contextmanager
def open_run_folder(request: RunRequest, launched: Launched) -> Iterator[Path]:
    """Agree on the run's folder, check that all workers have the same request, and lock the folder.

    A folder that was made here is removed if the run is refused before it begins.

    *Collectives*: all_gather_objects and broadcasts; every worker must call.

    Raises:
        ConfigError: the workers' configurations differ, or the folder cannot be used, or not by all;
            on all workers.
    """
    answers = from_all(request.config.model_dump_json())
    different = [rank for rank, text in enumerate(answers) if text != answers[0]]
    if different:
        raise ConfigError(
            f"configuration {request.name!r} of workers {different} differs from that of worker 0"
        )
    held, made = None, None
    # In a thread, for a copy from a store may take longer than the others' collectives.
    choose = partial(_choose_folder, request, launched) if launched.rank == 0 else None
    chosen = in_thread_of_first(choose, lambda: None)

    def take() -> Path:
        nonlocal held, made
        assert chosen is not None
        mine, is_new = chosen.result()
        made = mine.absolute() if is_new else None
        held = lock(mine)
        return mine

    try:
        named = from_first(chosen is not None, take)
        folder = named.absolute()
        lacking = [] if uses_store(request) else _without_folder(folder, chosen is not None)
        if lacking:
            raise ConfigError(
                f"`run_dir` must be a folder that all machines share, got {str(named)!r}, which workers "
                f"{lacking} do not see. Start them in one folder, or give a path that is the same"
            )
        yield named
    except ConfigError:
        if made is not None:
            remove_unstarted(made)
        raise
    finally:
        if held is not None:
            held.close()


def _without_folder(folder: Path, is_first: bool) -> list[int]:
    """List the workers that do not see the run's folder. *Collectives*: a broadcast and a gathering.

    A copy of it, on a disk of the machine's own and under the same path, is another folder.
    """

    def put_mark() -> str:
        name = f".seen-{secrets.token_hex(8)}"
        try:
            (folder / name).touch()
        except OSError as error:
            raise ConfigError(f"run {str(folder)!r} must be writable: {error.strerror}") from None
        return name

    mark = folder / from_first(is_first, put_mark)
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not os.path.exists(mark) and time.monotonic() < deadline:  # noqa: PTH110 raises nothing
        time.sleep(0.1)
    seen = from_all(os.path.exists(mark))  # noqa: PTH110
    if is_first:
        with suppress(OSError):
            mark.unlink()
    return [rank for rank, sees in enumerate(seen) if not sees]


def _choose_folder(request: RunRequest, launched: Launched) -> tuple[Path, bool]:
    """Return the run's folder, and True if it is new.

    It is the one that our launcher made, the user named, or this launch made before; else a new
    one.
    """
    if launched.run_folder is not None:
        return launched.run_folder, False
    if request.resume is not None:
        return check_resumable(request.config, request.resume), False
    found = (
        None if launched.launch_id is None else find_relaunched(request.config, launched.launch_id)
    )
    if found is not None:
        return found, False
    return make_run_folder(request.config, request.name, launched.launch_id), True


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
