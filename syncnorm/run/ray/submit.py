"""Jobs on a Ray cluster, seen from outside: submit, follow, stop, list."""

import asyncio
import os
import re
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from syncnorm import __version__
from syncnorm.errors import ConfigError
from syncnorm.run.env import read_cluster
from syncnorm.run.folder import RESUMABLE, read_exit
from syncnorm.run.ray.client import JobSubmissionClient, told
from syncnorm.run.ray.job import Job
from syncnorm.train.config.section import REFERENCE
from syncnorm.train.metrics import last_step

# Least time between a stop and a kill: workers finish their step and save, and a network file
# system may show the file that asks them only after a minute. A stop is over when the job is,
# however long it may take.
_STOP_SECONDS = 120
_POLL_SECONDS = 0.5
_RUNNING = ("PENDING", "RUNNING")
# What Ray puts before a line that another process of the job has written.
_FROM_WORKER = re.compile(r"^(?:\x1b\[\d+m)?\((\w+) pid=\d+(?:, ip=[^)]*)?\)(?:\x1b\[0m)? ?")
# Lines of Ray's own: when and where it does what.
_OF_RAY = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\t|^Running entrypoint for job ")
_NEVER_PACKED = (
    "**/.git", "**/.venv", "**/venv", "**/__pycache__", "**/checkpoints", "**/.env", "**/*.safetensors",
    "**/.ray/auth_token",
)  # fmt: skip
# Of the characters of a path those to which patterns of gitignore give a meaning; the spaces at an
# end are stripped.
_ESCAPED = {character: f"\\{character}" for character in "\\*?[]"} | {
    character: f"[{character}]" for character in " \t\n"
}


@dataclass(frozen=True)
class Seen:
    """A job as it looks from here.

    Args:
        submission_id: its name.
        status: as Ray has it: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        config: name of the configuration.
        folder: of the run.
        exit_code: of the run if it is over: 0 done, 1 failed, 2 bad input, 75 stopped and saved.
        step: optimizer steps on record, if the folder can be seen from here.
        reason: why it is over, if the folder can be seen from here.
        version: of syncnorm that submitted it.
    """

    submission_id: str
    status: str
    config: str
    folder: str
    exit_code: int | None
    step: int | None
    reason: str | None
    version: str

    @property
    def is_over(self) -> bool:
        """Whether it runs no more."""
        return self.status not in _RUNNING

    def as_facts(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return asdict(self)


def see(client: JobSubmissionClient, submission_id: str) -> Seen:
    """Look at a job.

    Raises:
        ConfigError: there is none of that name.
    """
    found = _find(client, submission_id)
    if found is None:
        raise ConfigError(
            f"no job {submission_id!r} on this cluster. `syncnorm list` has those that there are."
        )
    return _seen(found)


def see_all(client: JobSubmissionClient) -> list[Seen]:
    """Look at all jobs that syncnorm has submitted, the oldest first."""
    with told(client.get_address()):
        found = client.list_jobs()
    ours = [job for job in found if job.metadata and "syncnorm_folder" in job.metadata]
    return [_seen(job) for job in sorted(ours, key=lambda job: job.start_time or 0)]


def start(client: JobSubmissionClient, job: Job) -> int | None:
    """Submit a job, again if it has run before; None if it is running already, and nothing was
    done.

    Submitted again, a run goes on from its newest checkpoint.

    Returns:
        How many lines its log has already, of when it ran before: Ray goes on in the same file.
    """
    found = _find(client, job.submission_id)
    lines = 0
    with told(client.get_address()):
        if found is not None:
            if found.status in _RUNNING:
                return None
            lines = client.get_job_logs(job.submission_id).count("\n")
            client.delete_job(job.submission_id)
        client.submit_job(
            # Not a line for a shell to take apart: two words and one quoted argument.
            entrypoint=shlex.join(
                ["exec", "python", "-m", "syncnorm.run.ray.driver", job.as_text()]
            ),
            submission_id=job.submission_id,
            runtime_env=_runtime_env(job),
            metadata={
                "syncnorm_config": job.name,
                "syncnorm_folder": job.folder,
                "syncnorm_version": __version__,
            },
        )
    return lines


def follow(
    client: JobSubmissionClient, submission_id: str, skip: int = 0, to_stdout: bool = True
) -> Seen:
    """Pass on what the job says until it is over.

    Args:
        client: of the cluster.
        submission_id: of the job.
        skip: how many lines of its log are old.
        to_stdout: send the result, which is what its driver says, to standard output; the rest goes
            to standard error.
    """
    see(client, submission_id)
    lines = _Lines(sys.stdout if to_stdout else sys.stderr, skip)
    while True:
        try:
            asyncio.run(_tail(client, submission_id, lines))
        except (OSError, RuntimeError) as error:
            print(
                f"syncnorm: the log broke off ({type(error).__name__}); trying again",
                file=sys.stderr,
            )
        seen = see(client, submission_id)
        if seen.is_over:
            lines.end()
            return seen
        time.sleep(_POLL_SECONDS)


def stop(client: JobSubmissionClient, submission_id: str) -> Seen:
    """Have a job save and end, and wait until it has."""
    with told(client.get_address()):
        client.stop_job(submission_id)
    while not (seen := see(client, submission_id)).is_over:
        time.sleep(_POLL_SECONDS)
    return seen


def logs(client: JobSubmissionClient, submission_id: str) -> str:
    """What the job has said so far."""
    see(client, submission_id)
    with told(client.get_address()):
        return client.get_job_logs(submission_id)


def _find(client: JobSubmissionClient, submission_id: str) -> Any | None:
    with told(client.get_address()):
        return next((job for job in client.list_jobs() if job.submission_id == submission_id), None)


def _seen(job: Any) -> Seen:
    metadata = job.metadata or {}
    folder = metadata.get("syncnorm_folder", "")
    is_visible = bool(folder) and Path(folder).is_dir()
    end = read_exit(Path(folder)) if is_visible else None
    status = job.status.value
    return Seen(
        submission_id=job.submission_id,
        status=status,
        config=metadata.get("syncnorm_config", ""),
        folder=folder,
        exit_code=_exit_code(status, job.driver_exit_code, None if end is None else end.exit_code),
        step=last_step(Path(folder) / "metrics.jsonl") if is_visible else None,
        reason=None if end is None or status in _RUNNING else end.reason,
        version=metadata.get("syncnorm_version", ""),
    )


def _exit_code(status: str, driver: int | None, noted: int | None) -> int | None:
    """The run's exit status: what its driver ended with, else what it noted, for a stopped job has
    no other.
    """
    if status in _RUNNING:
        return None
    if status == "STOPPED":
        return RESUMABLE if noted is None else noted
    return driver if driver in (0, 1, 2, RESUMABLE) else 1


def _runtime_env(job: Job) -> dict[str, Any]:
    timeout = job.task().config.launch.timeout_seconds
    environment: dict[str, Any] = {
        # Ray's own is 3 seconds, in which nothing can be saved.
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(max(_STOP_SECONDS, round(2 * timeout)))}
    }
    config = job.task().config
    if REFERENCE.fullmatch(config.model.name) or REFERENCE.fullmatch(config.data.name):
        here = Path.cwd()
        environment["working_dir"] = str(here)
        environment["excludes"] = kept_out(here, config.run_dir, config.data.root)
    return environment


def kept_out(here: Path, *others: str | None) -> list[str]:
    """What lies in the working folder and is no code, as patterns of gitignore: runs, data, the
    token, and the like.
    """
    token, home = read_cluster().token_path, here.resolve()
    found = set[str]()
    for other in (*others, token):
        if other is not None:
            path = here / other
            # As it is called, the link that it may be, and what that leads to.
            for name in (
                Path(os.path.normpath(path)),
                path.parent.resolve() / path.name,
                path.resolve(),
            ):
                found |= {
                    str(name.relative_to(root)) for root in (here, home) if root in name.parents
                }
    return [
        *_NEVER_PACKED,
        *sorted("/" + "".join(_ESCAPED.get(c, c) for c in name) for name in found),
    ]


class _Lines:
    """Takes a log in pieces, and passes on each line once, even if the log comes again from its
    beginning.

    Args:
        result: where to the driver's lines go.
        told: how many lines are known already.
    """

    def __init__(self, result: TextIO, told: int) -> None:
        self._result = result
        self._rest = ""
        self._told = told
        self._skip = 0

    def again(self) -> None:
        """The log is about to come from its beginning."""
        self._rest, self._skip = "", self._told

    def take(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if self._skip:
                self._skip -= 1
                continue
            self._told += 1
            tell(line, self._result)

    def end(self) -> None:
        """No more is to come."""
        if self._rest and not self._skip:
            tell(self._rest, self._result)


def tell(line: str, result: TextIO) -> None:
    """Pass on a line of a job's log without what Ray puts before it: the driver's to `result`."""
    plain, count = _FROM_WORKER.subn("", line)
    if count:
        # Ray's own processes report on things that it then mends.
        if "core_worker.cc" not in plain:
            print(plain, file=sys.stderr, flush=True)
    elif line.startswith("syncnorm: "):
        print(line, file=sys.stderr, flush=True)
    elif not _OF_RAY.match(line):
        print(line, file=result, flush=True)


async def _tail(client: JobSubmissionClient, submission_id: str, lines: _Lines) -> None:
    lines.again()
    async for text in client.tail_job_logs(submission_id):
        lines.take(text)
