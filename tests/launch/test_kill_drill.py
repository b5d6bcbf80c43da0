"""The kill drill, in short; and that it can fail."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from drills import kill_run
from drills.kill_drill import differences, drill, main, report
from drills.kill_evidence import Evidence, digest, gather, left_behind, processes
from drills.kill_run import OPTIONS, STEPS, Fault, Result
from syncnorm.train.checkpoint.snapshot import Snapshot
from syncnorm.train.checkpoint.store import CheckpointStore
from syncnorm.train.files import only_writer
from tests.train import runs

SEED = 5
LEFT_ALONE = Evidence("a", {"step 1": [2.0, 0.1, None]}, "step-1", 9)


def assert_survived(results: list[Result], kills: int, torn: int) -> None:
    assert [result.problems for result in results] == [[] for _ in results]
    assert results[0].faults == []
    assert sum(result.kills for result in results) == kills
    assert sum(len(result.faults) - result.kills for result in results) == torn
    assert all(len(result.starts) > 1 for result in results[1:])


def test_nothing_is_lost_by_kills_and_torn_saves(tmp_path):
    """Two kills of workers and one of the launcher, two torn saves: at an operation and at a
    byte.
    """
    assert_survived(list(drill(tmp_path, workers=2, kills=3, torn=2, seed=SEED)), 3, 2)


@pytest.mark.slow
def test_nothing_is_lost_where_processes_load_the_samples(tmp_path):
    assert_survived(list(drill(tmp_path, 2, kills=3, torn=2, seed=SEED, loads=True)), 3, 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_is_lost_on_three_workers(tmp_path):
    assert_survived(list(drill(tmp_path, workers=3, kills=8, torn=8, seed=SEED)), 8, 8)


@pytest.mark.slow
def test_a_trainer_that_forgets_its_optimizer_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(kill_run, "NET", "tests.train.nets:forgetful")
    alone, killed = drill(tmp_path, workers=2, kills=1, torn=0, seed=SEED)
    assert (alone.problems, len(killed.faults)) == ([], 1)
    # Its curve may show it, too, at a step that was taken before the kill and after.
    assert any(each.startswith("the last checkpoint has the SHA-256 ") for each in killed.problems)


def test_a_run_that_fails_is_exit_status_1(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(["--workers", "257", "--kills", "1", "--torn", "0"]) == 1
    out, err = capfd.readouterr()
    assert "257 workers, run 1: exit status 2: syncnorm: " in err
    assert "`launch.workers` must be less than or equal to 256, got 257" in err
    assert out.splitlines()[-1].startswith("NOT all runs ended as they must, see ")


@pytest.fixture
def trained(pool, tmp_path) -> Callable[..., Path]:
    """trained(name, stop_at): the folder of such a run on two workers of the pool, begun or gone on
    with.
    """

    def train(name: str, stop_at: int | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        options = [option for option in OPTIONS if not option.startswith("launch.")]
        pool(2).run(runs.train_digits, str(folder), options, stop_at)
        return folder

    return train


def newest(folder: Path) -> Snapshot:
    snapshot, _, _ = CheckpointStore(folder / "checkpoints").newest()
    assert snapshot is not None
    return snapshot


def evidence(folder: Path) -> Evidence:
    found, problems = gather(folder)
    assert found is not None
    assert problems == []
    return found


def next_up(tensor: Tensor) -> None:
    """Change one number by its last bit."""
    first = tensor.view(-1)[:1]
    first.copy_(first + 1 if not first.is_floating_point() else torch.nextafter(first, first + 1))


CHANGES: dict[str, Callable[[Snapshot], Any]] = {
    "weights": lambda s: next_up(s.tensors["model"]["conv1.weight"]),
    "buffers": lambda s: next_up(s.tensors["model"]["bn1.running_mean"]),
    "averages": lambda s: next_up(s.tensors["ema"]["module.bn1.running_var"]),
    "momentum": lambda s: next_up(s.states["optimizer"]["state"][0]["momentum_buffer"]),
    "learning rate": lambda s: s.states["optimizer"]["param_groups"][0].update(lr=0.0),
    "schedule": lambda s: s.states["schedule"].update(last_epoch=1),
    "the last worker's random numbers": lambda s: next_up(s.states["workers"][-1]["rng"]["torch"]),
    "Python's random numbers": lambda s: s.states["workers"][-1]["rng"].update(
        python=(3, (0,) * 625, None)
    ),
    "position": lambda s: s.facts["position"].update(loss_sum=1e-300),
}


def test_the_digest_sees_every_part(trained):
    folder = trained("parts", stop_at=4)
    digests = {"as it is": digest(newest(folder))}
    for name, change in CHANGES.items():
        other = newest(folder)
        assert digest(other) == digests["as it is"]
        change(other)
        digests[name] = digest(other)
    assert len(set(digests.values())) == len(digests)


def gone_on(trained, name: str, change: Callable[[Tensor], object]) -> Evidence:
    """What a run comes to that is stopped, and goes on with another momentum."""
    folder = trained(name, stop_at=12)
    snapshot = newest(folder)
    change(snapshot.states["optimizer"]["state"][0]["momentum_buffer"])
    CheckpointStore(folder / "checkpoints").write(snapshot)
    return evidence(trained(name))


def test_an_altered_optimizer_is_another_run(trained):
    expected = evidence(trained("whole"))
    assert len(expected.curve) == STEPS + 4
    assert differences(expected, gone_on(trained, "as it was", lambda momentum: None)) == []
    altered = gone_on(trained, "altered", lambda momentum: momentum.mul_(1.01))
    digests, curves = differences(expected, altered)
    assert digests == f"the last checkpoint has the SHA-256 {altered.digest}, not {expected.digest}"
    assert "records differ or lack, 36 there are: step 14" in curves


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": "b"}, "the last checkpoint has the SHA-256 b, not a"),
        ({"curve": {"step 1": [2.5, 0.1, None]}}, "1 records differ or lack, 1 there are: step 1"),
        ({"curve": {}}, "1 records differ or lack, 0 there are: step 1"),
        ({"curve": {**LEFT_ALONE.curve, "step 2": []}}, "0 records differ or lack, 2 there are: "),
        ({"best": None}, "the best checkpoint is None, not step-1"),
    ],
)
def test_what_differs_is_told(change, message):
    assert differences(LEFT_ALONE, LEFT_ALONE) == []
    assert differences(LEFT_ALONE, LEFT_ALONE._replace(**change)) == [message]


def test_a_step_on_record_with_two_losses_is_told(trained):
    folder = trained("twice", stop_at=4)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 2, "loss": 7.5, "lr": 0.0}\n')
    _, (problem,) = gather(folder)
    assert problem.startswith("step 2 is on record with [")
    assert problem.endswith("and with [7.5, 0.0, None]")


def test_what_is_left_behind_is_found(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "run.lock").touch()
    assert left_behind(tmp_path) == []
    (tmp_path / "checkpoints" / ".tmp-step-00000002").mkdir()
    with only_writer(tmp_path / "checkpoints"):
        assert left_behind(tmp_path) == [
            "left behind: checkpoints/.tmp-step-00000002",
            "still locked: checkpoints",
        ]


def test_a_process_that_stays_is_found(tmp_path):
    environment = {**os.environ, "SYNCNORM_DRILL_TEST": str(tmp_path)}
    command = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert processes("SYNCNORM_DRILL_TEST", str(tmp_path)) == [process.pid]
        process.kill()
    assert processes("SYNCNORM_DRILL_TEST", str(tmp_path)) == []


def test_a_fault_in_a_run_that_ended_otherwise_has_not_been_survived():
    good = Result([Fault("worker killed", 10.0)], kills=1, starts=[1.0, 14.0], evidence=LEFT_ALONE)
    bad = Result(
        [Fault("worker killed", 20.0)], kills=1, starts=[2.0, 26.0], problems=["another digest"]
    )
    assert report(2, [Result(), good, bad])[-1] == "| worker killed | 2 | 1 | 5.0 | 6.0 |"
