"""Which failure is told when several workers fail."""

import json
import signal

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from syncnorm.run.failures import root_cause

GLOO = "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:29106."
# Both where a peer is killed before the group has come to be.
STORE = "DistNetworkError: Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown?"
STORE_TIMEOUT = "DistStoreError: wait timeout after 30000ms, keys: /default_pg/0//cpu//0/1"
ABORTED = (
    "DistBackendError: NCCL communicator was aborted on rank 1.  Original reason for failure was: "
    "[Rank 1] Watchdog "
    "caught collective operation timeout: WorkNCCL(SeqNum=10, OpType=ALLREDUCE, Timeout(ms)=90000) "
    "ran for 90057 ms"
)
WATCHDOG = (
    "DistBackendError: [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1"
)
REMOTE = (
    "DistBackendError: NCCL error in: NCCLUtils.cpp:93, remote process exited or there was a "
    "network error, NCCL "
    "version 2.27.5\nncclRemoteError: A call failed possibly due to a network error or a remote "
    "process exiting."
)
SETUP = (
    "DistBackendError: [1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] "
    "via c10d key-value "
    "store by key '0', but store->get('0') got error: wait timeout after 90000ms, keys: "
    "/default_pg/0//cuda//0"
)
# As an error of NCCL's own, by NVIDIA/nccl issues 795 and 1514.
INTERNAL = (
    "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1275, internal error, NCCL version "
    "2.14.3\nncclInternalError: Internal check failed.\nLast error:\n"
)
CLOSED = f"{INTERNAL}socketProgress: Connection closed by remote peer host<50260>"
PIPE = f"{INTERNAL}Call to recv from 10.0.0.7<58355> failed : Broken pipe"
ABORT = "RuntimeError: NCCL communicator was aborted."
NCCL = [ABORTED, WATCHDOG, REMOTE, SETUP, CLOSED, PIPE, ABORT]


@pytest.fixture
def failure(tmp_path):
    """failure(rank, exitcode, message, timestamp): as torch's agent reports it."""

    def make(rank, exitcode, message=None, timestamp=100):
        path = tmp_path / f"error-{rank}.json"
        if message is not None:
            extra = {"py_callstack": f"Traceback of {rank}", "timestamp": str(timestamp)}
            path.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
        made = ProcessFailure(local_rank=rank, pid=1, exitcode=exitcode, error_file=str(path))
        made.timestamp = timestamp
        return made

    return make


def test_the_first_failure_is_the_cause(failure):
    error = ChildFailedError(
        "x", {0: failure(0, 1, "ValueError: b", 101), 1: failure(1, 1, "ValueError: a", 100)}
    )
    assert root_cause(error).reason == "worker 1 failed: ValueError: a"
    assert root_cause(error).traceback == "Traceback of 1"


@pytest.mark.parametrize("echo_timestamp", [99, 100])
@pytest.mark.parametrize("echo", [GLOO, *NCCL], ids=lambda echo: echo[-60:])
def test_a_lost_peer_is_not_the_cause(failure, echo, echo_timestamp):
    error = ChildFailedError(
        "x", {0: failure(0, 1, echo, echo_timestamp), 1: failure(1, 1, "KeyError: 'k'", 100)}
    )
    assert root_cause(error).reason == "worker 1 failed: KeyError: 'k'"


def test_an_abort_without_a_word_is_the_cause_only_of_what_lost_its_peer(failure):
    # NCCL's watchdog ends the process of a worker that waits for another.
    aborted = failure(0, -signal.SIGABRT, None, 99)
    error = ChildFailedError("x", {0: aborted, 1: failure(1, 1, "KeyError: 'k'", 100)})
    assert root_cause(error).reason == "worker 1 failed: KeyError: 'k'"
    error = ChildFailedError(
        "x", {0: aborted, 1: failure(1, 1, GLOO, 98), 2: failure(2, -signal.SIGTERM, None, 98)}
    )
    found = root_cause(error)
    assert found.reason == "worker 0 was killed by SIGABRT"
    assert found.is_loss


@pytest.mark.parametrize(
    "own",
    [
        "DistBackendError: NCCL error in: NCCLUtils.cpp:93, unhandled cuda error, NCCL version "
        "2.27.5",
        f"{INTERNAL}Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000",
    ],
    ids=["cuda", "duplicate"],
)
def test_a_fault_of_the_machine_that_nccl_tells_is_no_echo(failure, own):
    error = ChildFailedError("x", {0: failure(0, 1, REMOTE, 99), 1: failure(1, 1, own, 100)})
    assert root_cause(error).reason == f"worker 1 failed: {own}"


def test_a_kill_is_the_cause_and_the_launchers_own_signal_is_not(failure):
    failures = {
        0: failure(0, -signal.SIGTERM, None, 99),
        1: failure(1, 1, GLOO, 99),
        2: failure(2, -signal.SIGKILL),
    }
    assert root_cause(ChildFailedError("x", failures)).reason == "worker 2 was killed by SIGKILL"


@pytest.mark.parametrize("echo", [GLOO, STORE, STORE_TIMEOUT, *NCCL], ids=lambda echo: echo[-60:])
def test_a_lost_peer_is_told_and_tried_again_if_nothing_else_is_known(failure, echo):
    found = root_cause(ChildFailedError("x", {0: failure(0, 1, echo)}))
    assert found.reason == f"worker 0 failed: {echo}"
    assert found.is_loss


def test_code_that_fails_is_not_tried_again(failure):
    assert not root_cause(ChildFailedError("x", {0: failure(0, 1, "ValueError: a")})).is_loss


def test_a_message_goes_before_how_the_process_ended(failure):
    error = ChildFailedError("x", {0: failure(0, -signal.SIGABRT, "OSError: disk full")})
    assert root_cause(error).reason == "worker 0 failed: OSError: disk full"


def test_a_worker_that_said_nothing(failure):
    assert (
        root_cause(ChildFailedError("x", {0: failure(0, 3)})).reason
        == "worker 0 ended with status 3"
    )
