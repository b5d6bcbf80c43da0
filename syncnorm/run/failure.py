"""Which of several failed workers is the cause, and which only lost their peer."""

import signal
from dataclasses import dataclass
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from syncnorm.errors import ConfigError

# What gloo, NCCL and the store say on a worker whose peer is gone (the kinds are those of the store alone), and then
# what debug mode says.
_ECHOES = (
    "DistNetworkError: ",
    "DistStoreError: ",
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "remote process exited",
    "Timed out waiting",
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
        is_loss: whether a worker was lost, by a kill, a crash or a time limit; code that fails would fail again.
        is_bad_input: whether the worker refused its configuration; the reason is what it said.
    """

    reason: str
    traceback: str
    is_loss: bool = False
    is_bad_input: bool = False


def root_cause(error: ChildFailedError) -> Failure:
    """Choose the failure that came first and is not the echo of another."""
    rank = min(error.failures, key=lambda rank: (_is_echo(error.failures[rank]), error.failures[rank].timestamp))
    return _describe(rank, error.failures[rank])


def _is_echo(failure: ProcessFailure) -> bool:
    # SIGTERM is what the launcher itself ends the remaining workers with.
    return failure.exitcode == -signal.SIGTERM or _lost_its_peer(failure)


def _lost_its_peer(failure: ProcessFailure) -> bool:
    return is_echo(_told(failure).get("message", ""))


def is_echo(message: str) -> bool:
    """Whether an error, as KIND: MESSAGE, only says that another worker is gone."""
    return any(echo in message for echo in _ECHOES)


def _describe(rank: int, failure: ProcessFailure) -> Failure:
    if failure.exitcode == -signal.SIGALRM:
        return Failure(f"worker {rank} was stuck; where each worker was is in logs/stacks-*.txt", "", is_loss=True)
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
