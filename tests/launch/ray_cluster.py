"""A Ray cluster of two nodes on this machine, which ends with the tests, whatever becomes of them."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from syncnorm import system
from tests.launch import commands

# The machine may be busy with other things.
PATIENCE_SECONDS = 1500
# A port that was free may be taken before Ray listens on it.
_ATTEMPTS = 3
_PORT_TAKEN = "ddress already in use"


class NodeEnded(Exception):
    """A node ended that was to run."""


@dataclass
class Node:
    """One node: a `ray start --block` in a session of its own.

    Args:
        process: of the command.
        ip: where it listens.
    """

    process: subprocess.Popen[bytes]
    ip: str


@dataclass
class Cluster:
    """A cluster that runs.

    Args:
        folder: of Ray's own files.
        address: of the dashboard.
        gcs: where nodes and drivers meet.
        environment: of each of its processes.
        nodes: the first is the head.
    """

    folder: Path
    address: str
    gcs: str
    environment: Mapping[str, str]
    nodes: list[Node] = field(default_factory=list)

    def started(
        self, *arguments: str, folder: Path
    ) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
        """Start a command of syncnorm's that speaks to this cluster."""
        return commands.started(
            [*commands.SYNCNORM, *arguments, "--address", self.address], folder, self.environment
        )

    def add_node(self, ip: str, cpus: int = 2) -> Node:
        """Start another node and wait until it belongs to the cluster.

        Raises:
            NodeEnded: it, or the head, has ended.
        """
        # Of two log monitors on a machine each would tell every line.
        options = ["--address", self.gcs, "--include-log-monitor=false"]
        node = self._start(ip, cpus, *options)
        count = sum(each.process.poll() is None for each in self.nodes)
        self._wait_until(lambda: self._count_nodes() >= count, node)
        return node

    def start_head(self, ip: str, cpus: int) -> None:
        """Start the first node and wait until it takes jobs.

        Raises:
            NodeEnded: it has ended.
        """
        port, dashboard = self.gcs.rpartition(":")[2], self.address.rpartition(":")[2]
        options = [
            "--head",
            "--port",
            port,
            "--dashboard-host=127.0.0.1",
            "--dashboard-port",
            dashboard,
        ]
        options += ["--ray-client-server-port", str(free_port()), "--temp-dir", str(self.folder)]
        node = self._start(ip, cpus, *options)
        self._wait_until(self._answers, node)

    def close(self) -> None:
        """End all processes of the cluster, and remove its folder."""
        for node in self.nodes:
            with contextlib.suppress(ProcessLookupError):
                node.process.terminate()
        for node in self.nodes:
            end(node)
        kill_processes_of(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait_until(self, is_so: Callable[[], bool], node: Node) -> None:
        """Wait for what comes true while the head and a new node run."""

        def is_so_or_ended() -> bool:
            for each in (self.nodes[0], node):
                if each.process.poll() is not None:
                    raise NodeEnded(f"{each.ip} ended: {self._logs()}")
            return is_so()

        wait_until(is_so_or_ended, self._logs)

    def _start(self, ip: str, cpus: int, *options: str) -> Node:
        command = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--block",
            f"--node-ip-address={ip}",
        ]
        command += ["--num-cpus", str(cpus), "--num-gpus=0", "--object-store-memory=100000000"]
        command += [
            "--disable-usage-stats",
            "--dashboard-agent-listen-port",
            str(free_port()),
            *options,
        ]
        with (self.folder / f"start-{len(self.nodes)}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
                # The rest of a node dies with this command.
                preexec_fn=partial(system.die_with_parent, os.getpid()),
            )
        self.nodes.append(Node(process, ip))
        return self.nodes[-1]

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            self._get("/api/version")
            return True
        return False

    def _count_nodes(self) -> int:
        with contextlib.suppress(OSError):
            return self._get("/nodes?view=summary").count('"ALIVE"')
        return 0

    def _get(self, path: str) -> str:
        request = urllib.request.Request(self.address + path)
        if "RAY_AUTH_TOKEN_PATH" in self.environment:
            token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
            request.add_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()

    def _logs(self) -> str:
        return "\n".join(
            log.read_text(errors="replace")[-2000:] for log in self.folder.glob("start-*.log")
        )


@contextlib.contextmanager
def local_cluster(
    nodes: int = 2, cpus: int = 2, environment: Mapping[str, str] | None = None
) -> Iterator[Cluster]:
    """Start a cluster on 127.0.0.2 and following, and end it on the way out."""
    cluster = _start_cluster(nodes, cpus, environment or {})
    try:
        yield cluster
    finally:
        cluster.close()


def _start_cluster(nodes: int, cpus: int, environment: Mapping[str, str]) -> Cluster:
    for left in reversed(range(_ATTEMPTS)):
        cluster = _without_nodes(environment)
        try:
            cluster.start_head("127.0.0.2", cpus)
            for number in range(1, nodes):
                cluster.add_node(f"127.0.0.{2 + number}", cpus)
            return cluster
        except BaseException as error:
            cluster.close()
            if not left or not isinstance(error, NodeEnded) or _PORT_TAKEN not in str(error):
                raise
            warnings.warn(f"a cluster starts again: {error}", stacklevel=2)
    raise AssertionError("the last attempt returns or raises")


def _without_nodes(environment: Mapping[str, str]) -> Cluster:
    # Sockets lie in it, and their paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    own = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Else Ray takes a token that it finds in the home.
        "RAY_AUTH_MODE": "disabled",
    }
    return Cluster(
        folder,
        f"http://127.0.0.1:{free_port()}",
        f"127.0.0.2:{free_port()}",
        {**own, **environment},
    )


def end(node: Node) -> None:
    """End a node and all that is in its process group."""
    node.process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        node.process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(node.process.pid, signal.SIGKILL)
    node.process.wait(PATIENCE_SECONDS)


def wait_until(is_so: Callable[[], bool], explain: Callable[[], str] = str) -> None:
    """Wait for something that will come true."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {PATIENCE_SECONDS} seconds: {explain()}")
        time.sleep(0.1)


def free_port() -> int:
    """A port that nobody listens on, on any of this machine's addresses.

    None that Linux gives to connections by default, nor that Ray gives to its workers: it would be taken
    again before a process listens on it.
    """
    # Tests seed `random`, and those of another process with the same seeds.
    numbers = random.SystemRandom()
    while True:
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", numbers.randrange(20_000, 32_768)))
            return listener.getsockname()[1]


def kill_processes_of(folder: Path) -> None:
    """A worker is in a process group of its own, and goes with its node; if not, it is known by
    Ray's folder.
    """
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if str(folder).encode() in (entry / "cmdline").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
