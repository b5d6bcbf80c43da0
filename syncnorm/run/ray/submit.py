"""Operations on a cluster's jobs through its job server: submit, follow, stop, list."""

import asyncio
import contextlib
import math
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from syncnorm import __version__
from syncnorm.errors import ConfigError
from syncnorm.run.ending import read_exit
from syncnorm.run.errors import RESUMABLE
from syncnorm.run.ray.client import JobSubmissionClient, translated_errors
from syncnorm.train.metrics import last_step

_POLL_SECONDS = 0.5
# A job begins within a few seconds on a cluster that has room for it.
_SILENT_SECONDS = 10.0
# Three of the periods in which Ray looks after its jobs.
_MONITOR_SECONDS = 3.0
_RUNNING = ("PENDING", "RUNNING")
# Exit statuses of a driver that has said why in the job's log.
_OF_DRIVER = (0, 1, 2, RESUMABLE)
# Begin of the reason of others.
LOST = "ended without a record of why; Ray says"
_MOST_CHARACTERS = 500
# Ray's prefix of a line that another process of the job has written.
_FROM_WORKER = re.compile(
    r"^(?:\x1b\[\d+m)?\((?:\w+ pid=\d+(?:, ip=[^)]*)?|raylet)\)(?:\x1b\[0m)? ?"
)
# A line of Ray's core, which any process of the job may write at any time, as on a busy machine.
_OF_RAYS_CORE = re.compile(r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ [A-Z] \d+ \d+\] ")
# Log lines of Ray itself.
_OF_RAY = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\t|^Running entrypoint for job ")


@dataclass(frozen=True)
class JobStatus:
    """State of a job.

    Args:
        submission_id: its name.
        status: in Ray's terms: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        config: name of the configuration.
        folder: of the run.
        exit_code: of a run that is over: 0 done, 1 failed, 2 bad input, 75 stopped and saved.
        step: optimizer steps on record, if the folder is visible from here.
        reason: of its end, if the folder is visible from here; Ray's, if it was no end of its
            driver's own, or while it waits.
        version: of syncnorm that submitted it.
        started, ended: seconds since 1970; None before.
    """

    submission_id: str
    status: str
    config: str
    folder: str
    exit_code: int | None
    step: int | None
    reason: str | None
    version: str
    started: float | None = None
    ended: float | None = None

    @property
    def is_over(self) -> bool:
        """True if the job has ended."""
        return self.status not in _RUNNING


def get_status(client: JobSubmissionClient, submission_id: str) -> JobStatus:
    """Read the state of a job.

    Raises:
        ConfigError: no job has that name.
    """
    found = _find(client, submission_id)
    if found is None:
        raise ConfigError(
            f"no job {submission_id!r} on this cluster. `syncnorm list` has those that there are."
        )
    return _to_status(found)


def list_statuses(client: JobSubmissionClient) -> list[JobStatus]:
    """Read the states of all jobs that syncnorm has submitted, the oldest first."""
    with translated_errors(client.get_address()):
        found = client.list_jobs()
    ours = [job for job in found if job.metadata and "syncnorm_folder" in job.metadata]
    return [_to_status(job) for job in sorted(ours, key=lambda job: job.start_time or 0)]


@dataclass(frozen=True)
class Entry:
    """What a job runs on the cluster.

    Args:
        submission_id: Ray's name of the job.
        module: of the driver.
        description: the driver's only argument.
        config: name of the configuration.
        folder: of the run, or of a sweep.
        runtime_env: of Ray.
        resources: of the driver, as Ray's client names them.
    """

    submission_id: str
    module: str
    description: str
    config: str
    folder: str
    runtime_env: dict[str, Any]
    resources: dict[str, Any] = field(default_factory=dict)


def start(client: JobSubmissionClient, job: Entry) -> list[str] | None:
    """Submit a job, unless it is running.

    A run that is submitted again resumes from its newest checkpoint.

    Returns:
        The lines that its log may hold from earlier runs: Ray appends to the same file where the
        driver is on the same node. None if the job is running already.
    """
    found = _find(client, job.submission_id)
    lines: list[str] = []
    with translated_errors(client.get_address()):
        if found is not None:
            if found.status in _RUNNING:
                return None
            # Of a node that is gone there is no log.
            with contextlib.suppress(RuntimeError):
                lines = client.get_job_logs(job.submission_id).split("\n")[:-1]
            _outwait_monitor(found)
            client.delete_job(job.submission_id)
        client.submit_job(
            # Quoted: Ray passes the entrypoint to a shell.
            entrypoint=shlex.join(["exec", "python", "-m", job.module, job.description]),
            submission_id=job.submission_id,
            runtime_env=job.runtime_env,
            **job.resources,
            metadata={
                "syncnorm_config": job.config,
                "syncnorm_folder": job.folder,
                "syncnorm_version": __version__,
            },
        )
    return lines


def _outwait_monitor(job: Any) -> None:
    """Wait until Ray looks after a job no more that has ended just now.

    It looks once a second. A job of the same name that is submitted before the next look is taken
    for the old one, whose process is gone, and declared failed.
    """
    since = time.time() - (job.end_time or 0) / 1000
    time.sleep(min(_MONITOR_SECONDS, max(0.0, _MONITOR_SECONDS - since)))


def follow(client: JobSubmissionClient, submission_id: str, lines: "LogLines") -> JobStatus:
    """Print the job's log until the job is over.

    Args:
        client: of the cluster.
        submission_id: of the job.
        lines: what was printed before, which is not printed again.
    """
    _outwait_pending(client, submission_id)
    while True:
        try:
            asyncio.run(_tail(client, submission_id, lines))
        except (OSError, RuntimeError) as error:
            print(
                f"syncnorm: the log broke off ({type(error).__name__}); trying again",
                file=sys.stderr,
            )
        status = get_status(client, submission_id)
        if status.is_over:
            lines.flush()
            return status
        time.sleep(_POLL_SECONDS)


def _outwait_pending(client: JobSubmissionClient, submission_id: str) -> None:
    """Wait until a job has begun; after a while say once what Ray says of it."""
    says_at = time.monotonic() + _SILENT_SECONDS
    while (status := get_status(client, submission_id)).status == "PENDING":
        if time.monotonic() >= says_at:
            print(f"syncnorm: {submission_id} waits: {status.reason}", file=sys.stderr, flush=True)
            says_at = math.inf
        time.sleep(_POLL_SECONDS)


def stop(client: JobSubmissionClient, submission_id: str) -> JobStatus:
    """Let a job save and end, and wait for its end."""
    with translated_errors(client.get_address()):
        client.stop_job(submission_id)
    while not (status := get_status(client, submission_id)).is_over:
        time.sleep(_POLL_SECONDS)
    return status


def logs(client: JobSubmissionClient, submission_id: str) -> str:
    """Return the job's log."""
    get_status(client, submission_id)
    with translated_errors(client.get_address()):
        return client.get_job_logs(submission_id)


def _find(client: JobSubmissionClient, submission_id: str) -> Any | None:
    with translated_errors(client.get_address()):
        try:
            return client.get_job_info(submission_id)
        except RuntimeError as error:
            if "does not exist" not in str(error):
                raise
            return None


def _to_status(job: Any) -> JobStatus:
    metadata = job.metadata or {}
    folder = metadata.get("syncnorm_folder", "")
    is_visible = bool(folder) and Path(folder).is_dir()
    end = read_exit(Path(folder)) if is_visible else None
    status = job.status.value
    code = _exit_code(status, job.driver_exit_code, None if end is None else end.exit_code)
    return JobStatus(
        submission_id=job.submission_id,
        status=status,
        config=metadata.get("syncnorm_config", ""),
        folder=folder,
        exit_code=code,
        step=last_step(Path(folder) / "metrics.jsonl") if is_visible else None,
        # The record may be that of an earlier end.
        reason=end.reason if end is not None and end.exit_code == code else _rays_reason(job),
        version=metadata.get("syncnorm_version", ""),
        started=_seconds(job.start_time),
        ended=_seconds(job.end_time),
    )


def _rays_reason(job: Any) -> str | None:
    """Return what Ray says of a job that waits, or has failed without its driver's own doing."""
    status = job.status.value
    if status == "FAILED" and job.driver_exit_code not in _OF_DRIVER:
        # Without the end of the log, which the message may have.
        said = (job.message or "").partition(", last available logs")[0]
        return f"{LOST}: {' '.join(said.split()).rstrip('.')[:_MOST_CHARACTERS]}"
    return job.message if status == "PENDING" else None


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None


def _exit_code(status: str, driver: int | None, noted: int | None) -> int | None:
    """Return the run's exit status: the driver's, or the recorded one for a stopped job."""
    if status in _RUNNING:
        return None
    if status == "STOPPED":
        return RESUMABLE if noted is None else noted
    return driver if driver in _OF_DRIVER else 1


class LogLines:
    """Line splitter that prints each line once, even if the log comes again from its beginning.

    Args:
        result: stream for the driver's lines, the result; all others go to standard error.
        printed: old lines, which are not printed if the log begins with them.
    """

    def __init__(self, result: TextIO, printed: Sequence[str] = ()) -> None:
        self._result = result
        self._rest = ""
        self._printed = list(printed)
        self._at = len(self._printed)

    def restart(self) -> None:
        """Prepare for the log from its beginning."""
        self._rest, self._at = "", 0

    def feed(self, text: str) -> None:
        """Print the new lines that the next piece of the log completes."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if self._printed[self._at : self._at + 1] != [line]:
                # Also if another node has the driver, and a log of its own.
                self._printed[self._at :] = [line]
                print_log_line(line, self._result)
            self._at += 1

    def flush(self) -> None:
        """Print the rest, a line without an end."""
        if self._rest and self._at == len(self._printed):
            print_log_line(self._rest, self._result)


def print_log_line(line: str, result: TextIO) -> None:
    """Print a line of a job's log without Ray's prefix; the driver's lines go to `result`."""
    plain, count = _FROM_WORKER.subn("", line)
    if count:
        # Ray's own processes warn of faults that Ray then repairs.
        if "core_worker.cc" not in plain:
            print(plain, file=sys.stderr, flush=True)
    elif line.startswith("syncnorm: ") or _OF_RAYS_CORE.match(line):
        print(line, file=sys.stderr, flush=True)
    elif not _OF_RAY.match(line):
        print(line, file=result, flush=True)


async def _tail(client: JobSubmissionClient, submission_id: str, lines: LogLines) -> None:
    lines.restart()
    async for text in client.tail_job_logs(submission_id):
        lines.feed(text)
