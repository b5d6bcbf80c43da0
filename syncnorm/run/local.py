"""Local runs: starts workers on this machine, and starts them again after the loss of one."""

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from syncnorm.errors import ConfigError
from syncnorm.run import env, interrupt
from syncnorm.run.ending import Exit, read_exit
from syncnorm.run.errors import RunError, RunStopped
from syncnorm.run.failures import Failure, root_cause
from syncnorm.run.folder import check_resumable, make_run_folder, remove_unstarted, upload_rest
from syncnorm.run.given import Given
from syncnorm.run.machine import check_capacity, choose_device
from syncnorm.run.processes import can_fork, prepare_to_fork, run_processes
from syncnorm.run.request import RunRequest, uses_store
from syncnorm.run.resume import resume_command
from syncnorm.run.worker import run_launched
from syncnorm.system import call_apart, tell
from syncnorm.train.files import open_to_write
from syncnorm.train.header import describe_workers
from syncnorm.train.metrics import MetricsFile, last_step
from syncnorm.train.storage import read_origin

# Time for workers to finish their step and save after a signal to stop.
_LEAST_SHUTDOWN_SECONDS = 30


def run_local(request: RunRequest, begin: Callable[[Path], None] | None = None) -> Path:
    """Start `launch.workers` workers, and wait for them.

    Workers that are killed are restarted from the newest checkpoint.

    Args:
        request: checked already.
        begin: called with the run's folder before the workers start.

    Returns:
        The run's folder.

    Raises:
        ConfigError: the machine lacks devices or memory, the run's folder cannot be made or belongs
            to another configuration, or the workers refused the configuration.
        RunError: the run failed.
        RunStopped: it was stopped, and can be resumed.
    """
    launch = request.config.launch
    device = choose_device(launch.device, 0, launch.most_workers)
    note = check_capacity(launch, device)
    forks = can_fork(device)
    if forks:
        prepare_to_fork()
    if forks and _asks_a_store(request):
        # Apart, since the threads of a store's package would not survive the fork. Objects of a
        # program need not be pickled, and are not needed.
        folder = call_apart(_find_folder, replace(request, given=Given()))
    else:
        folder = _find_folder(request)
    before = _stamp(folder)
    try:
        # From here on a signal leaves a record of the end in the folder.
        with interrupt.for_launcher(), env.for_workers(folder):
            if note is not None:
                tell(f"syncnorm: {note}")
            if begin is not None:
                begin(folder)
            if request.shows:
                tell(describe_workers(launch.most_workers, device))
            _run_with_restarts(request, folder, forks, before)
    except RunError:
        upload_rest(folder, request.config)
        raise
    except interrupt.Stopped as stopped:
        # The workers had a limit for their last copy.
        upload_rest(folder, request.config)
        _raise_if_stopped(folder, request, before, stopped.number)
        end = _new_exit(folder, before)
        if end is not None and end.status == "done":
            return folder
        status = 128 + stopped.number
        reason = f"stopped by {stopped.number.name}, without saving"
        _write_exit(reason, folder, before, status)
        upload_rest(folder, request.config)
        raise RunError(f"{reason}\n{folder}", status) from None
    return folder


def _asks_a_store(request: RunRequest) -> bool:
    return uses_store(request) or (
        request.resume is not None and read_origin(Path(request.resume)) is not None
    )


def _find_folder(request: RunRequest) -> Path:
    if request.resume is None:
        return make_run_folder(request.config, request.name)
    return check_resumable(request.config, request.resume)


def _run_with_restarts(request: RunRequest, folder: Path, forks: bool, before: int | None) -> None:
    """Start the workers, again after the loss of one, until they are done."""
    launch = request.config.launch
    for attempt in range(launch.restarts + 1):
        try:
            failure = _run_once(request, folder, forks, before)
        except ConfigError:
            if request.resume is None:
                remove_unstarted(folder)
            raise
        if failure is None and _new_exit(folder, before) is None:
            failure = Failure("the workers ended with status 0 before the run was done", "")
        if failure is None:
            return
        if not failure.is_loss or attempt == launch.restarts:
            raise RunError(_record_failure(failure, request, folder, before))
        again = f"{failure.reason}; starting again ({attempt + 1} of {launch.restarts})"
        MetricsFile(folder / "metrics.jsonl").write_timed(
            "fault", step=last_step(folder / "metrics.jsonl"), kind="restart", message=again
        )
        tell(f"syncnorm: {again}")


def _run_once(request: RunRequest, folder: Path, forks: bool, before: int | None) -> Failure | None:
    """Start the workers once and wait for them; return the failure, None if they are done."""
    launch = request.config.launch
    patience_seconds = max(_LEAST_SHUTDOWN_SECONDS, launch.patience_seconds)
    return run_once(
        partial(run_launched, request),
        launch.most_workers,
        forks,
        patience_seconds,
        partial(_raise_if_stopped, folder, request, before),
    )


def run_once(
    work: Callable[[], object],
    count: int,
    forks: bool,
    patience_seconds: float,
    look: Callable[[], None] = lambda: None,
) -> Failure | None:
    """Start workers on this machine, and wait for them; return the failure, None if they are done.

    Args:
        work, count, forks, patience_seconds: see `run_processes`.
        look: called after a failure, before its cause is looked for.

    Raises:
        ConfigError: the workers refused their input.
    """
    logs = tempfile.mkdtemp(prefix="syncnorm-")
    try:
        run_processes(work, count, Path(logs), forks, patience_seconds)
    except ChildFailedError as error:
        look()
        failure = root_cause(error)
        if failure.is_bad_input:
            raise ConfigError(failure.reason) from None
        return failure
    finally:
        shutil.rmtree(logs, ignore_errors=True)
    return None


def _stamp(folder: Path) -> int | None:
    """Return the time of the record of an end before this one, if there is one."""
    try:
        return (folder / "exit.json").stat().st_mtime_ns
    except OSError:
        return None


def _new_exit(folder: Path, before: int | None) -> Exit | None:
    """Read how this attempt has ended; None if what is there is the record of an earlier one."""
    return None if _stamp(folder) == before else read_exit(folder)


def _raise_if_stopped(
    folder: Path, request: RunRequest, before: int | None, number: int | None = None
) -> None:
    end = _new_exit(folder, before)
    if end is not None and end.status == "stopped":
        raise RunStopped(
            f"stopped after step {end.step}: {end.reason}. To go on: {_to_go_on(folder, request)}",
            folder,
            number,
        )


def _to_go_on(folder: Path, request: RunRequest) -> str:
    if request.given.is_empty:
        return resume_command(folder, request.allowed)
    return f"the same call of syncnorm.fit with resume={str(folder)!r}"


def _record_failure(failure: Failure, request: RunRequest, folder: Path, before: int | None) -> str:
    """Record the failure in the run's folder and return the message for the user.

    A run that failed before it began leaves no folder but its traceback, in place of the last one.
    """
    if request.resume is None and failure.traceback and not failure.is_loss:
        remove_unstarted(folder)
    if not folder.exists():
        return f"{failure.reason}\n{_write_traceback(failure, folder.parent)}"
    _write_exit(failure.reason, folder, before)
    if not failure.traceback:
        return f"{failure.reason}\n{folder}"
    return f"{failure.reason}\n{_write_traceback(failure, folder)}"


def _write_traceback(failure: Failure, folder: Path) -> Path:
    """Write it into a folder; return where it is, or the folder if that cannot be written."""
    path = folder / "traceback.txt"
    try:
        with open_to_write(path) as file:
            file.write(failure.traceback.encode())
    except OSError:
        return folder
    return path


def _write_exit(reason: str, folder: Path, before: int | None, status: int = 1) -> None:
    """Record a failure, after the last step that is known of."""
    end, step = _new_exit(folder, before), last_step(folder / "metrics.jsonl")
    with contextlib.suppress(OSError):
        Exit("failed", reason, max(step, 0 if end is None else end.step), status).write(folder)
