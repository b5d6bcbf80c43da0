"""Which of several failed workers is the cause, and which only lost their peer."""

import signal
from dataclasses import dataclass
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

# What gloo and NCCL say on a worker whose peer is gone.
_ECHOES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "remote process exited",
)


@dataclass(frozen=True)
class Failure:
    """Why a run failed: a sentence that names the worker, and the worker's traceback if it left one."""

    reason: str
    traceback: str


def root_cause(error: ChildFailedError) -> Failure:
    """Choose the failure that came first and is not the echo of another."""
    rank = min(error.failures, key=lambda rank: (_is_echo(error.failures[rank]), error.failures[rank].timestamp))
    return _describe(rank, error.failures[rank])


def _is_echo(failure: ProcessFailure) -> bool:
    # SIGTERM is what the launcher itself ends the remaining workers with.
    return failure.exitcode == -signal.SIGTERM or any(echo in _told(failure).get("message", "") for echo in _ECHOES)


def _describe(rank: int, failure: ProcessFailure) -> Failure:
    told = _told(failure)
    if told:
        return Failure(f"worker {rank} failed: {told['message']}", told["extraInfo"]["py_callstack"])
    if failure.exitcode < 0:
        return Failure(f"worker {rank} was killed by {failure.signal_name()}", "")
    return Failure(f"worker {rank} ended with status {failure.exitcode}", "")


def _told(failure: ProcessFailure) -> dict[str, Any]:
    """Return what the worker's error file says; empty if it left none."""
    message = failure.error_file_data.get("message")
    return message if isinstance(message, dict) else {}
