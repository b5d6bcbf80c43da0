"""Two network namespaces as two machines, with agents of torchrun or nodes of Ray, and a wire that
can be cut.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from subprocess import Popen

import pytest

from tests.launch import commands, ray_cluster
from tests.launch.record import Run

ADDRESSES = ("10.77.0.1", "10.77.0.2")
ENVIRONMENT = {
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "wire",
}
# All samples in a step, and so many steps that the wire is cut before the last.
EPOCHS = 30
OPTIONS = [
    f"train.epochs={EPOCHS}",
    "train.global_batch=1437",
    "checkpoint.every=1",
    "launch.timeout_seconds=8",
]
# How long an agent waits for the other before it gives up.
JOIN_SECONDS = 40
# More than all limits together, with the starts of workers on a busy machine.
PATIENCE_SECONDS = 180

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Machines:
    """Two namespaces, each kept by a process, joined by a pair of interfaces called `wire`."""

    def __init__(self, keepers: tuple[int, int]) -> None:
        self._keepers = keepers

    def enter(self, machine: int) -> list[str]:
        """What to put before a command to run it there."""
        return [
            "nsenter",
            "-t",
            str(self._keepers[machine]),
            "--user",
            "--preserve-credentials",
            "--net",
            "--",
        ]

    def run(self, machine: int, command: list[str]) -> None:
        done = subprocess.run(
            [*self.enter(machine), *command],
            capture_output=True,
            text=True,
            timeout=commands.DEADLINE_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def ip(self, machine: int, arguments: str) -> None:
        self.run(machine, ["ip", *arguments.split()])

    def join(self) -> None:
        self.ip(0, f"link add wire type veth peer name wire netns {self._keepers[1]}")
        for machine, address in enumerate(ADDRESSES):
            self.ip(machine, f"addr add {address}/24 dev wire")
            self.ip(machine, "link set lo up")
            self.ip(machine, "link set wire up")


@contextlib.contextmanager
def keeper(before: list[str]) -> Iterator[int]:
    """A process in a new network namespace; skips the test where that is refused."""
    command = [*before, "sh", "-c", "echo ready && exec cat"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            _, err = process.communicate(timeout=commands.DEADLINE_SECONDS)
            pytest.skip(f"network namespaces are refused here: {err.strip()}")
        yield process.pid
        process.kill()


@pytest.fixture
def machines() -> Iterator[Machines]:
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}, of util-linux or iproute2")
    with keeper(["unshare", "--user", "--map-root-user", "--net"]) as first:
        with keeper([*Machines((first, first)).enter(0), "unshare", "--net"]) as second:
            made = Machines((first, second))
            made.join()
            yield made


def agent(machines: Machines, machine: int) -> list[str]:
    """The command of an agent with one worker; the first machine hosts the store at which they
    meet.
    """
    limits = f"is_host={int(machine == 0)},join_timeout={JOIN_SECONDS},read_timeout=20,last_call_timeout=3"
    command = [
        *machines.enter(machine),
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
    ]
    command += [
        "--nproc-per-node",
        "1",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"{ADDRESSES[0]}:29400",
    ]
    command += ["--rdzv-id", "wire", "--rdzv-conf", limits, "--local-addr", ADDRESSES[machine]]
    command += [
        "--monitor-interval",
        "0.5",
        "--max-restarts",
        "5",
        "--redirects",
        "3",
        "--log-dir",
        f"out-{machine}",
    ]
    return [*command, "-m", "syncnorm", "train", "digits", *OPTIONS]


@pytest.fixture
def agents(machines, tmp_path) -> Iterator[tuple[Popen[str], Popen[str]]]:
    """An agent on each machine; a run that has made some steps."""
    with (
        commands.started(agent(machines, 0), tmp_path, ENVIRONMENT) as first,
        commands.started(agent(machines, 1), tmp_path, ENVIRONMENT) as second,
    ):
        both = (first, second)
        wait_until(lambda: len(Run(tmp_path).events("step")) >= 3, both)
        yield both


def wait_until(condition: Callable[[], bool], agents: Sequence[Popen[str]]) -> None:
    commands.wait_while_alive(condition, agents, PATIENCE_SECONDS)


def has_workers(agents: tuple[Popen[str], Popen[str]]) -> bool:
    """Whether a worker lives; one that its agent has not looked after yet is none."""
    lists = (
        Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split() for agent in agents
    )
    return any(is_alive(worker) for workers in lists for worker in workers)


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_wire_that_is_cut_for_longer_than_the_limit_ends_in_a_restart(machines, agents, tmp_path):
    machines.ip(0, "link set wire down")
    # Each worker finds itself stuck and ends; the agents cannot start others without each other.
    wait_until(lambda: not has_workers(agents), agents)
    machines.ip(0, "link set wire up")
    for each in agents:
        _, err = each.communicate(timeout=PATIENCE_SECONDS)
        assert each.returncode == 0, err
    starts = Run(tmp_path).events("start")
    assert [start["world_size"] for start in starts] == [2, 2]
    assert starts[1]["step"] > 0
    assert {event["step"] for event in Run(tmp_path).events("step")} == set(range(1, EPOCHS + 1))


def test_a_wire_that_stays_cut_ends_in_errors_with_names(machines, agents):
    # Else the agent without the store asks again for 15 minutes, as long as Linux does.
    machines.run(1, ["sh", "-c", "echo 5 > /proc/sys/net/ipv4/tcp_retries2"])
    machines.ip(0, "link set wire down")
    errors = [each.communicate(timeout=PATIENCE_SECONDS)[1] for each in agents]
    assert [each.returncode for each in agents] == [1, 1]
    assert "RendezvousTimeoutError" in errors[0]
    assert "RendezvousConnectionError" in errors[1]


@contextlib.contextmanager
def ray_node(machines: Machines, machine: int, folder: Path, *options: str) -> Iterator[Popen[str]]:
    """A node of Ray on a machine, with room for one worker; ended on the way out."""
    command = [
        *machines.enter(machine),
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--block",
    ]
    command += ["--node-ip-address", ADDRESSES[machine], "--num-cpus=1", "--num-gpus=0"]
    command += ["--object-store-memory=100000000", "--disable-usage-stats", *options]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with commands.started(command, folder, {**ENVIRONMENT, "PATH": path}) as process:
        yield process


def another_node(machines: Machines, folder: Path) -> contextlib.AbstractContextManager[Popen[str]]:
    return ray_node(
        machines, 1, folder, "--address", f"{ADDRESSES[0]}:6379", "--include-log-monitor=false"
    )


@pytest.fixture
def nodes(machines, tmp_path) -> Iterator[tuple[Popen[str], Popen[str]]]:
    """A cluster with a node on each machine, the head on the first."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'syncnorm[ray]'")
    # Sockets lie in it, and their paths must be short.
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:
        try:
            options = ["--head", "--port=6379", "--dashboard-host=127.0.0.1", "--temp-dir", folder]
            with ray_node(machines, 0, tmp_path, *options) as head:
                wait_until(lambda: call(machines, tmp_path, "list").returncode == 0, [head])
                with another_node(machines, tmp_path) as other:
                    yield head, other
        finally:
            ray_cluster.kill_processes_of(Path(folder))


def call(machines: Machines, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of syncnorm's on the first machine."""
    return commands.run([*machines.enter(0), *commands.SYNCNORM, *arguments], folder)


def test_a_node_of_ray_behind_a_cut_wire_is_done_without_and_comes_back(machines, nodes, tmp_path):
    head, other = nodes

    def workers() -> int | None:
        """How many there are in the last group that has made a step."""
        record = Run(tmp_path).events("start", "step")
        began = [
            first["world_size"]
            for first, second in pairwise(record)
            if first["event"] == "start" != second["event"]
        ]
        return began[-1] if began else None

    options = [*OPTIONS, "train.epochs=100000", "launch.workers=[1, 2]", "--id", "wire"]
    submitted = call(machines, tmp_path, "submit", "digits", *options, "--no-wait")
    assert submitted.returncode == 0, submitted.stderr
    wait_until(lambda: workers() == 2, nodes)
    machines.ip(0, "link set wire down")
    wait_until(lambda: workers() == 1, [head])
    machines.ip(0, "link set wire up")
    # It hears that it was given up, and ends.
    other.communicate(timeout=PATIENCE_SECONDS)
    with another_node(machines, tmp_path) as third:
        wait_until(lambda: workers() == 2, [head, third])
        stopped = call(machines, tmp_path, "stop", "wire", "--json")
    assert json.loads(stopped.stdout)["exit_code"] == 75, stopped.stderr
    steps = [event["step"] for event in Run(tmp_path).events("step")]
    assert set(steps) == set(range(1, max(steps) + 1))
