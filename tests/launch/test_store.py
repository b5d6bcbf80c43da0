"""Runs with an address, by the real command; most with an S3 server on this machine."""

import json
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from drills import store_drill
from drills.local_s3 import BUCKET, local_s3
from syncnorm.run.ending import read_exit
from tests.launch import commands
from tests.launch.record import digests, run_folder
from tests.train.runs import events

SHORT = ["train.epochs=2", "train.global_batch=500", f"run_dir=s3://{BUCKET}/runs", "name=mine"]
TRAIN = [*commands.SYNCNORM, "train", "digits", *SHORT]


@pytest.fixture(scope="module")
def s3():
    for package in ("moto", "flask_cors", "s3fs"):
        pytest.importorskip(package, reason=f"{package}, for an S3 server, is not installed")
    with local_s3() as environment:
        yield environment


@pytest.fixture(scope="module")
def copied(s3, tmp_path_factory) -> tuple[Path, CompletedProcess[str]]:
    """A run's folder, and the command that made it."""
    folder = tmp_path_factory.mktemp("copied")
    done = commands.run(TRAIN, folder, s3)
    return run_folder(folder, done), done


def address(run: Path) -> str:
    return f"s3://{BUCKET}/runs/{run.name}"


def test_a_run_is_copied_and_goes_on_from_its_address(s3, copied, tmp_path):
    run, done = copied
    assert json.loads((run / "storage.json").read_text()) == {"url": address(run)}
    assert f"copied to {address(run)}" in done.stderr
    assert events(run, "fault") == []

    # Nothing is left to do, so all that it has is from the store.
    again = commands.run([*TRAIN, "--resume", address(run)], tmp_path, s3)
    there = run_folder(tmp_path, again)
    assert there.name == run.name
    assert digests(again.stdout) == digests(done.stdout)
    assert events(there, "step") == events(run, "step")
    end = read_exit(there)
    assert end is not None
    assert end.status == "done"


def test_torchrun_goes_on_from_an_address(s3, copied, tmp_path):
    run, _ = copied
    module = [*commands.TORCHRUN, "-m", "syncnorm", "train", "digits", *SHORT]
    longer = [*module, "train.epochs=3", "--resume", address(run)]
    done = commands.run(longer, tmp_path, s3)
    there = run_folder(tmp_path, done)
    steps = events(run, "step")
    assert events(there, "start")[-1]["step"] == len(steps)
    assert events(there, "step")[: len(steps)] == steps
    assert len(events(there, "step")) == len(steps) * 3 // 2
    assert f"copied to {address(run)}" in done.stderr
    assert events(there, "fault") == []


def test_a_run_whose_store_ends_with_it(tmp_path):
    """fsspec's memory is each process's own, so that this needs no server."""
    options = ["run_dir=memory://runs", "launch.workers=1", "train.epochs=1"]
    done = commands.run([*TRAIN, *options], tmp_path)
    run = run_folder(tmp_path, done)
    assert json.loads((run / "storage.json").read_text()) == {"url": f"memory://runs/{run.name}"}
    assert "copied to memory://runs/mine-" in done.stderr
    assert events(run, "fault") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["run_dir=s3://missing/runs"],
            "`run_dir` cannot be used: cannot write config.yaml to s3:",
        ),
        (["--resume", f"s3://{BUCKET}/runs/other"], f"there is no run at s3://{BUCKET}/runs/other"),
        (["--resume", "s3://missing/runs/other"], "s3://missing/runs/other"),
    ],
)
def test_what_is_not_there_is_refused_at_once(options, message, s3, tmp_path):
    done = commands.run([*TRAIN, *options], tmp_path, s3)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("syncnorm: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_few_kills_while_it_is_copied(s3, capsys):
    assert store_drill.main(["--kills", "3", "--seed", "1"]) == 0
    assert "3 of 3 kills survived" in capsys.readouterr().out
