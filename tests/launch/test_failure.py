"""Which failure is told when several workers fail."""

import json
import signal

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from syncnorm.run.failure import root_cause

GLOO = "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:29106."
# Both where a peer is killed before the group has come to be.
STORE = "DistNetworkError: Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown?"
STORE_TIMEOUT = "DistStoreError: wait timeout after 30000ms, keys: /default_pg/0//cpu//0/1"


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
    error = ChildFailedError("x", {0: failure(0, 1, "ValueError: b", 101), 1: failure(1, 1, "ValueError: a", 100)})
    assert root_cause(error).reason == "worker 1 failed: ValueError: a"
    assert root_cause(error).traceback == "Traceback of 1"


@pytest.mark.parametrize("echo_timestamp", [99, 100])
def test_a_lost_peer_is_not_the_cause(failure, echo_timestamp):
    error = ChildFailedError("x", {0: failure(0, 1, GLOO, echo_timestamp), 1: failure(1, 1, "KeyError: 'k'", 100)})
    assert root_cause(error).reason == "worker 1 failed: KeyError: 'k'"


def test_a_kill_is_the_cause_and_the_launchers_own_signal_is_not(failure):
    failures = {0: failure(0, -signal.SIGTERM, None, 99), 1: failure(1, 1, GLOO, 99), 2: failure(2, -signal.SIGKILL)}
    assert root_cause(ChildFailedError("x", failures)).reason == "worker 2 was killed by SIGKILL"


@pytest.mark.parametrize("echo", [GLOO, STORE, STORE_TIMEOUT])
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
    assert root_cause(ChildFailedError("x", {0: failure(0, 3)})).reason == "worker 0 ended with status 3"
