"""One disaster after the other on Ray clusters of one's own, and runs that do not mind.

Prints how long each took.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'syncnorm[ray]'")

from ray.job_submission import JobSubmissionClient

from tests.launch import commands
from tests.launch.ray_cluster import PATIENCE_SECONDS, Cluster, end, local_cluster, wait_until
from tests.launch.record import Run, undisturbed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

FIXED = ["digits", "train.epochs=60", "checkpoint.every=10", "launch.workers=2"]
# As for torchrun: steps that take long, in float64, and a curve that does not depend on how many
# follow.
ELASTIC = [
    "digits",
    "train.dtype=float64",
    "train.global_batch=1437",
    "train.schedule.name=constant",
]
ELASTIC += ["train.schedule.warmup=0", "train.lr=0.02", "checkpoint.every=1"]


def wait_for_group(run: Run, count: int, steps: int = 3) -> None:
    """Wait until at least so many groups of workers have been, and the last has made some steps."""
    wait_until(lambda: run.has_group(count, steps))


class Clock:
    """Prints how long things took."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def begin(self) -> None:
        self._since = time.monotonic()

    def tell(self, what: str) -> None:
        print(f"{time.monotonic() - self._since:6.1f} s  {what}")


def processes(*words: str) -> Iterator[int]:
    """All processes with these words on their command line."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes()
            if all(word.encode() in line for word in words):
                yield int(entry.name)


def call(cluster: Cluster, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    with cluster.started(*arguments, folder=folder) as process:
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def wait_for_end(cluster: Cluster, name: str) -> None:
    client = JobSubmissionClient(cluster.address)
    wait_until(lambda: client.get_job_info(name).status.is_terminal())


def test_a_fixed_number_of_workers_comes_through_with_the_same_bits(tmp_path):
    run, clock, folder = Run(tmp_path), Clock(), tmp_path / "runs" / "drill"
    submit = ["submit", *FIXED, "--id", "drill"]
    with local_cluster(cpus=1) as cluster:
        clock.tell("cluster up")
        clock.begin()
        assert call(cluster, tmp_path, *submit, "--no-wait").returncode == 0
        wait_for_group(run, 1)
        clock.tell("submitted to training")

        clock.begin()
        os.kill(commands.holder(folder / "logs" / "rank-1.log"), signal.SIGKILL)
        wait_for_group(run, 2)
        clock.tell("worker killed to training again")

        clock.begin()
        for driver in list(processes("syncnorm.run.ray.driver", str(folder))):
            os.kill(driver, signal.SIGKILL)
        wait_for_end(cluster, "drill")
        assert call(cluster, tmp_path, *submit, "--no-wait").returncode == 0
        wait_for_group(run, 3)
        clock.tell("driver killed, submitted again, to training")

        clock.begin()
        assert call(cluster, tmp_path, "stop", "drill").returncode == 0
        clock.tell("stopped and saved")
        note = json.loads((folder / "exit.json").read_text())
        assert note["exit_code"] == 75
        clock.begin()
        assert call(cluster, tmp_path, *submit, "--no-wait").returncode == 0
        wait_for_group(run, 4)
        clock.tell("submitted again to training")
        assert run.events("start")[-1]["step"] == note["step"]
        for node in cluster.nodes:
            os.killpg(node.process.pid, signal.SIGKILL)
    clock.begin()
    with local_cluster(cpus=1) as cluster:
        done = call(cluster, tmp_path, *submit)
        assert done.returncode == 0, done.stderr
        clock.tell("all of the cluster killed, another one, submitted again, to the end")
    assert run.groups() == [2] * 5
    assert run.losses() == undisturbed(tmp_path / "undisturbed", FIXED, 3 * PATIENCE_SECONDS)


def node_id(cluster: Cluster, ip: str) -> str:
    script = (
        f"import ray; ray.init(address={cluster.gcs!r}, logging_level='ERROR', "
        "log_to_driver=False);"
        "print(*[n['NodeID'] for n in ray.nodes() if n['Alive'] and n['NodeManagerAddress'] == "
        f"{ip!r}])"
    )
    done = commands.run([sys.executable, "-c", script], cluster.folder, cluster.environment)
    return done.stdout.split()[-1]


def drain(cluster: Cluster, node: str, seconds: int) -> None:
    command = [
        str(Path(sys.executable).with_name("ray")),
        "drain-node",
        "--address",
        cluster.gcs,
        "--node-id",
        node,
    ]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "drill"]
    done = commands.run(
        [*command, "--deadline-remaining-seconds", str(seconds)],
        cluster.folder,
        cluster.environment,
    )
    assert done.returncode == 0, done.stderr


def test_nodes_go_and_come_and_no_notice_costs_a_step(tmp_path):
    run, clock = Run(tmp_path), Clock()
    submit = ["submit", *ELASTIC, "train.epochs=100000", "launch.workers=[1, 2]", "--id", "drill"]
    with local_cluster(cpus=1) as cluster:
        assert call(cluster, tmp_path, *submit, "--no-wait").returncode == 0
        wait_for_group(run, 1)
        assert run.groups() == [2]

        clock.begin()
        os.killpg(cluster.nodes[1].process.pid, signal.SIGKILL)
        wait_for_group(run, 2)
        clock.tell("node killed to training on what is left")
        assert run.groups()[-1] == 1

        clock.begin()
        returned = cluster.add_node("127.0.0.4", cpus=1)
        wait_for_group(run, 3)
        clock.tell("another node to training on both")
        assert run.groups()[-1] == 2
        # The workers were told, and have saved.
        assert run.events("start")[-1]["step"] == run.events("stop")[-1]["step"]

        clock.begin()
        drain(cluster, node_id(cluster, returned.ip), 20)
        stops = len(run.events("stop"))
        wait_until(lambda: len(run.events("stop")) >= max(stops, 2))
        clock.tell("notice to saved")
        wait_for_group(run, 4)
        clock.tell("notice to training on what is left")
        assert run.groups()[-1] == 1
        assert run.events("start")[-1]["step"] == run.events("stop")[-1]["step"]
        end(returned)
        stopped = call(cluster, tmp_path, "stop", "drill", "--json")
        assert json.loads(stopped.stdout)["exit_code"] == 75
    losses = run.losses()
    steps = max(losses)
    assert sorted(losses) == list(range(1, steps + 1))
    options = [*ELASTIC, f"train.epochs={steps}", "launch.workers=1"]
    expected = undisturbed(tmp_path / "undisturbed", options, 3 * PATIENCE_SECONDS)
    assert losses == pytest.approx(expected, rel=1e-9, abs=0)
    assert losses[steps] < 0.999 * losses[1]


def test_a_job_that_waits_for_its_place_can_be_stopped(tmp_path):
    with local_cluster(nodes=1, cpus=1) as cluster:
        endless = ["submit", "digits", "train.epochs=100000", "launch.workers=1"]
        assert call(cluster, tmp_path, *endless, "--id", "first", "--no-wait").returncode == 0
        wait_for_group(Run(tmp_path, "first"), 1)
        assert call(cluster, tmp_path, *endless, "--id", "second", "--no-wait").returncode == 0
        # Ray Train makes it before it looks for a place.
        wait_until((tmp_path / "runs" / "second" / "ray").exists)
        stopped = call(cluster, tmp_path, "stop", "second", "--json")
        seen = json.loads(stopped.stdout)
        assert (seen["status"], seen["exit_code"], seen["step"]) == ("STOPPED", 75, 0)
        assert seen["reason"] == "asked to stop by syncnorm stop; no worker was running"
        assert call(cluster, tmp_path, "stop", "first").returncode == 0


TOKEN = "a-token-that-is-nowhere-to-be-seen"


def test_a_cluster_that_wants_a_token(tmp_path):
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    server = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with local_cluster(nodes=1, environment=server) as cluster:
        submit = [*commands.SYNCNORM, "submit", "digits", "train.epochs=1", "--id", "secret"]
        submit += ["--address", cluster.address]
        refused = commands.run(submit, tmp_path)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr == (
            f"syncnorm: the Ray cluster at {cluster.address} wants a token: "
            "export RAY_AUTH_TOKEN_PATH=FILE, or RAY_AUTH_TOKEN.\n"
        )
        wrong = commands.run(submit, tmp_path, {"RAY_AUTH_TOKEN": "another"})
        assert wrong.returncode == 2
        assert "does not take this token" in wrong.stderr
        assert not (tmp_path / "runs").exists()

        # The mode need not be given with the token.
        with commands.started(submit, tmp_path, {"RAY_AUTH_TOKEN_PATH": str(token)}) as process:
            wait_for_group(Run(tmp_path), 1)
            assert not list(processes(TOKEN))
            out, err = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0, err
        said = [
            out,
            err,
            *(
                path.read_text(errors="replace")
                for path in files(tmp_path / "runs", cluster.folder)
            ),
        ]
        assert len(said) > 10
        assert not [text for text in said if TOKEN in text]


def files(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        yield from (
            path
            for path in folder.rglob("*")
            if path.is_file() and path.stat().st_size < 10_000_000
        )
