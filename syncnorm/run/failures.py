"""Which of several failed workers is the cause, and which only lost their peer."""

import signal
from dataclasses import dataclass
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from syncnorm.errors import ConfigError

# What gloo, the store and NCCL say on a worker whose peer is gone or does not come, and then what
# debug mode says. Not NCCL's errors of the machine itself (ncclSystemError, ncclUnhandledCudaError,
# out of memory).
_ECHOES = (
    "DistNetworkError: ",
    "DistStoreError: ",
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "remote process exited",
    "Timed out waiting",
    "communicator was aborted",
    "is setting up NCCL communicator",
    "ncclRemoteError",
    "Watchdog caught collective operation timeout",
    "nothing more from rank",
    "not there within",
    "Store of the process group, which cannot be reached",
)


@dataclass(frozen=True)
class Failure:
    """Why a run failed.

    Args:
        reason: a sentence that names the worker.
        traceback: of the worker, if it left one.
        is_loss: whether a worker was lost, by a kill, a crash or a time limit; code that fails
            would fail again.
        is_bad_input: whether the worker refused its configuration; the reason is what it said.
    """

    reason: str
    traceback: str
    is_loss: bool = False
    is_bad_input: bool = False


def root_cause(error: ChildFailedError) -> Failure:
    """Choose the failure that came first and is not the echo of another."""
    rank = min(
        error.failures,
        key=lambda rank: (_distance(error.failures[rank]), error.failures[rank].timestamp),
    )
    return _describe(rank, error.failures[rank])


def _distance(failure: ProcessFailure) -> int:
    """How far a failure is from being a cause: 0, 1 if it may be the echo of another, 2 if it is
    one.
    """
    # SIGTERM is what the launcher itself ends the remaining workers with.
    if failure.exitcode == -signal.SIGTERM or _lost_its_peer(failure):
        return 2
    # NCCL's watchdog and gloo's threads end the process so, without a word in its error file; a
    # crash does, too.
    return int(failure.exitcode == -signal.SIGABRT and not _told(failure))


def _lost_its_peer(failure: ProcessFailure) -> bool:
    return is_echo(_told(failure).get("message", ""))


def is_echo(message: str) -> bool:
    """Whether an error, as KIND: MESSAGE, only says that another worker is gone."""
    return any(echo in message for echo in _ECHOES)


def _describe(rank: int, failure: ProcessFailure) -> Failure:
    if failure.exitcode == -signal.SIGALRM:
        return Failure(
            f"worker {rank} was stuck; where each worker was is in logs/stacks-*.txt",
            "",
            is_loss=True,
        )
    told = _told(failure)
    if told:
        kind, _, message = told["message"].partition(": ")
        if kind == ConfigError.__name__:
            return Failure(message, "", is_bad_input=True)
        return Failure(
            f"worker {rank} failed: {told['message']}",
            told["extraInfo"]["py_callstack"],
            is_loss=_lost_its_peer(failure),
        )
    if failure.exitcode < 0:
        return Failure(f"worker {rank} was killed by {failure.signal_name()}", "", is_loss=True)
    return Failure(f"worker {rank} ended with status {failure.exitcode}", "")


def _told(failure: ProcessFailure) -> dict[str, Any]:
    """Return what the worker's error file says; empty if it left none."""
    message = failure.error_file_data.get("message")
    return message if isinstance(message, dict) else {}
