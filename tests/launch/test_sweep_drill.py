"""A sweep that loses one of its two nodes on the way, and one that is stopped and goes on."""

import json
import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'syncnorm[ray]'")

from syncnorm.train.metrics import read_events
from tests.launch import commands
from tests.launch.ray_cluster import PATIENCE_SECONDS, local_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

SWEEP = ["sweep", "digits", "train.epochs=12", "checkpoint.every=5", "data.validation=0.2"]
SWEEP += [
    "train.lr=0.02,0.05,0.1",
    "norm.sync=batch,running",
    "launch.timeout_seconds=30",
    "launch.workers=1",
]


def steps(trial: Path) -> int:
    events, _ = read_events(trial / "metrics.jsonl")
    return sum(event["event"] == "step" for event in events)


def starts(trial: Path) -> list[int]:
    events, _ = read_events(trial / "metrics.jsonl")
    return [event["step"] for event in events if event["event"] == "start"]


def test_a_node_is_lost_and_all_trials_are_done(tmp_path):
    with local_cluster(
        cpus=1, environment={"PYTHONPATH": str(Path(__file__).parents[2])}
    ) as cluster:
        with cluster.started(*SWEEP, folder=tmp_path) as process:
            commands.wait_while_alive(
                lambda: sum(steps(each) > 12 for each in tmp_path.glob("runs/*/trial-*")) >= 2,
                [process],
                PATIENCE_SECONDS,
            )
            # The second node, with all that runs on it.
            lost = cluster.nodes[1].process
            os.killpg(lost.pid, signal.SIGKILL)
            cluster.add_node("127.0.0.4", 1)
            out, err = process.communicate(timeout=PATIENCE_SECONDS)
    print(err, out, sep="\n")
    assert process.returncode == 0, err
    folder = Path(out.splitlines()[-1])
    record = json.loads((folder / "sweep.json").read_text())
    assert [trial["status"] for trial in record["trials"]] == ["done"] * 6
    resumed = {each.name: starts(each) for each in folder.glob("trial-*")}
    print(resumed)
    assert any(len(each) > 1 and each[-1] > 0 for each in resumed.values())
    assert record["best"] in resumed


def test_ctrl_c_saves_and_the_sweep_goes_on(tmp_path):
    """On this machine, without a cluster."""
    command = [*commands.SYNCNORM, *SWEEP[:4], "train.lr=0.02,0.05", "data.validation=0.2"]
    with commands.started(command, tmp_path) as process:
        commands.wait_while_alive(
            lambda: any(steps(each) > 12 for each in tmp_path.glob("runs/*/trial-*")),
            [process],
            PATIENCE_SECONDS,
        )
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 75, err
    folder = Path(out.splitlines()[-1])
    ends = [json.loads(path.read_text()) for path in folder.glob("trial-*/exit.json")]
    assert "stopped" in {end["status"] for end in ends}
    again = [*commands.SYNCNORM, "sweep", "--resume", str(folder)]
    with commands.started(again, tmp_path) as process:
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, err
    record = json.loads((folder / "sweep.json").read_text())
    assert [trial["status"] for trial in record["trials"]] == ["done"] * 2
    assert any(each[-1] > 0 for each in map(starts, folder.glob("trial-*")))
    # What is done is not done again, and comes out the same.
    before = list(map(starts, folder.glob("trial-*")))
    assert commands.run(again, tmp_path).stdout == out
    assert list(map(starts, folder.glob("trial-*"))) == before
