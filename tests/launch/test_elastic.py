"""Agents of torchrun that go and come back, and the run that does not mind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from subprocess import Popen

import pytest

from tests.launch import commands
from tests.launch.record import Run, undisturbed

# All samples in a step, in float64: steps slow enough that an agent comes back within some dozens
# of them, and a curve that so many steps leave comparable. The rate is constant, so that a shorter
# run has the same curve.
TRAINING = [
    "digits",
    "train.dtype=float64",
    "train.global_batch=1437",
    "train.schedule.name=constant",
]
TRAINING += [
    "train.schedule.warmup=0",
    "train.lr=0.02",
    "checkpoint.every=1",
    "launch.timeout_seconds=60",
]
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
# An agent counts as lost after three keep-alives of 5 s, and workers take some seconds to start,
# more if the machine is busy.
PATIENCE_SECONDS = 600

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture
def port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def agent(port: int, nodes: str, folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Start an agent with one worker; the first on its port hosts the store at which the others
    meet.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        nodes,
        "--nproc-per-node",
        "1",
    ]
    command += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"127.0.0.1:{port}",
        "--rdzv-id",
        "elastic",
    ]
    # How long those who are there wait for one more.
    command += [
        "--rdzv-conf",
        "last_call_timeout=3",
        "--monitor-interval",
        "0.5",
        "--max-restarts",
        "20",
    ]
    # Nobody reads the pipes until the end, and the workers' tracebacks would fill them.
    command += ["--redirects", "3", "--log-dir", "worker-output"]
    command += ["-m", "syncnorm", "train", *TRAINING, *options]
    with commands.started(command, folder, ENVIRONMENT) as process:
        # Of two that start at once either may become the host.
        wait_until(lambda: is_listening(port), [process])
        yield process


def is_listening(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Callable[[], bool], agents: Sequence[Popen[str]]) -> None:
    commands.wait_while_alive(condition, agents, PATIENCE_SECONDS)


def wait_for_group(
    run: Run, agents: list[subprocess.Popen[str]], groups: int, steps: int = 2
) -> None:
    """Wait until at least so many groups of workers have been, and the last has made some steps."""
    wait_until(lambda: run.has_group(groups, steps), agents)


def worker_of(agent: subprocess.Popen[str]) -> int:
    (worker,) = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return int(worker)


def expected_losses(folder: Path, workers: int, epochs: int) -> dict[int, float]:
    options = [*TRAINING, f"launch.workers={workers}", f"train.epochs={epochs}"]
    return undisturbed(folder / "undisturbed", options, 2 * PATIENCE_SECONDS)


def test_an_agent_is_lost_and_comes_back(tmp_path, port):
    run = Run(tmp_path)
    with agent(port, "1:2", tmp_path, "train.epochs=1000") as first:
        with agent(port, "1:2", tmp_path, "train.epochs=1000") as second:
            wait_for_group(run, [first, second], 1)
            # As when a machine is switched off: the agent goes, and its worker with it.
            os.killpg(second.pid, signal.SIGKILL)
        wait_for_group(run, [first], 2)
        with agent(port, "1:2", tmp_path, "train.epochs=1000") as returned:
            wait_for_group(run, [first, returned], 3)
            assert run.groups() == [2, 1, 2]
    losses = run.losses()
    steps = max(losses)
    assert sorted(losses) == list(range(1, steps + 1))
    expected = expected_losses(tmp_path, 1, steps)
    assert losses == pytest.approx(expected, rel=1e-9, abs=0)
    # The curve is one that falls, not one that stands still and is equal for that reason.
    assert losses[steps] < 0.999 * losses[1]


def test_killed_workers_of_two_agents_are_started_again_ten_times(tmp_path, port):
    run, kills, epochs = Run(tmp_path), 10, 40
    with (
        agent(port, "2", tmp_path, f"train.epochs={epochs}") as first,
        agent(port, "2", tmp_path, f"train.epochs={epochs}") as second,
    ):
        for kill in range(kills):
            wait_for_group(run, [first, second], kill + 1, steps=1)
            os.kill(worker_of((first, second)[kill % 2]), signal.SIGKILL)
        for each in (first, second):
            _, err = each.communicate(timeout=PATIENCE_SECONDS)
            assert each.returncode == 0, err
    sizes = run.groups()
    assert len(sizes) > kills
    assert set(sizes) == {2}
    # On the same number of workers the same bits.
    assert run.losses() == expected_losses(tmp_path, 2, epochs)


def test_without_the_agent_that_hosts_the_store_the_launch_ends_and_can_be_repeated(tmp_path, port):
    run = Run(tmp_path)
    with agent(port, "1:2", tmp_path, "train.epochs=12") as host:
        with agent(port, "1:2", tmp_path, "train.epochs=12") as other:
            wait_for_group(run, [host, other], 1)
            os.killpg(host.pid, signal.SIGKILL)
            _, err = other.communicate(timeout=PATIENCE_SECONDS)
    assert other.returncode == 1
    assert "RendezvousConnectionError" in err
    before = max(run.losses())
    assert before < 12
    with agent(port, "1:2", tmp_path, "train.epochs=12") as again:
        _, err = again.communicate(timeout=PATIENCE_SECONDS)
    assert again.returncode == 0, err
    assert run.groups() == [2, 1]
    assert sorted(run.losses()) == list(range(1, 13))
