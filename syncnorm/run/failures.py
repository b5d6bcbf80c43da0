"""Diagnosis of failed workers: the cause, told apart from workers that only lost a peer."""

import signal
from dataclasses import dataclass
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from syncnorm.errors import ConfigError

# Messages of gloo, the store and NCCL on a worker whose peer is gone or does not come, then those
# of debug mode. Not NCCL's errors of the machine itself (ncclSystemError, ncclUnhandledCudaError,
# out of memory). A lost peer may come as any kind of NCCL error: its "Last error" tells.
_PEER_LOSS_MESSAGES = (
    "DistNetworkError: ",
    "DistStoreError: ",
    "Connection closed by peer",
    "Connection closed by remote peer",
    "Connection reset by peer",
    "Connection refused",
    "failed : Broken pipe",
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
    """Cause of a failed run.

    Args:
        reason: a sentence that names the worker.
        traceback: of the worker, if it wrote one.
        is_loss: a worker was lost, by a kill, a crash or a time limit, so a restart may help; code
            that fails would fail again.
        is_bad_input: the worker refused its configuration; `reason` is its message.
    """

    reason: str
    traceback: str
    is_loss: bool = False
    is_bad_input: bool = False


def root_cause(error: ChildFailedError) -> Failure:
    """Return the first failure that does not follow from the loss of a peer."""
    rank = min(
        error.failures,
        key=lambda rank: (_causal_order(error.failures[rank]), error.failures[rank].timestamp),
    )
    return _describe(rank, error.failures[rank])


def _causal_order(failure: ProcessFailure) -> int:
    """Sort key: 0 for a cause, 1 for what may follow from another failure, 2 for what does."""
    # The launcher itself ends the remaining workers by SIGTERM.
    if failure.exitcode == -signal.SIGTERM or _follows_peer_loss(failure):
        return 2
    # NCCL's watchdog and gloo's threads abort the process without an error file; so does a crash.
    return int(failure.exitcode == -signal.SIGABRT and not _error_file(failure))


def _follows_peer_loss(failure: ProcessFailure) -> bool:
    return is_peer_loss(_error_file(failure).get("message", ""))


def is_peer_loss(message: str) -> bool:
    """Return True for an error (KIND: MESSAGE) that only reports the loss of a peer."""
    return any(text in message for text in _PEER_LOSS_MESSAGES)


def _describe(rank: int, failure: ProcessFailure) -> Failure:
    if failure.exitcode == -signal.SIGALRM:
        return Failure(
            f"worker {rank} was stuck: no progress within `launch.timeout_seconds`; where each "
            "worker was is in logs/stacks-*.txt",
            "",
            is_loss=True,
        )
    written = _error_file(failure)
    if written:
        kind, _, message = written["message"].partition(": ")
        if kind == ConfigError.__name__:
            return Failure(message, "", is_bad_input=True)
        return Failure(
            f"worker {rank} failed: {written['message']}",
            written["extraInfo"]["py_callstack"],
            is_loss=_follows_peer_loss(failure),
        )
    if failure.exitcode < 0:
        return Failure(f"worker {rank} was killed by {failure.signal_name()}", "", is_loss=True)
    return Failure(f"worker {rank} ended with status {failure.exitcode}", "")


def _error_file(failure: ProcessFailure) -> dict[str, Any]:
    """Return the content of the worker's error file; empty if there is none."""
    message = failure.error_file_data.get("message")
    return message if isinstance(message, dict) else {}
