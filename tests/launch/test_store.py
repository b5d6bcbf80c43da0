"""Runs with an address, by the real command; most with an S3 server on this machine."""

import json

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


def test_a_run_is_copied_and_goes_on_from_its_address(s3, tmp_path):
    done = commands.run(TRAIN, tmp_path, s3)
    run = run_folder(tmp_path, done)
    url = f"s3://{BUCKET}/runs/{run.name}"
    assert json.loads((run / "storage.json").read_text()) == {"url": url}
    assert f"copied to {url}" in done.stderr
    assert events(run, "fault") == []

    empty = tmp_path / "empty"
    empty.mkdir()
    # Nothing is left to do, so all that it has is from the store.
    again = commands.run([*TRAIN, "--resume", url], empty, s3)
    assert again.returncode == 0, again.stderr
    there = run_folder(empty, again)
    assert there.name == run.name
    assert digests(again) == digests(done)
    assert events(there, "step") == events(run, "step")
    end = read_exit(there)
    assert end is not None
    assert end.status == "done"


def test_a_run_whose_store_ends_with_it(tmp_path):
    """fsspec's memory is each process's own, so that this needs no server."""
    options = ["run_dir=memory://runs", "launch.workers=1", "train.epochs=1"]
    done = commands.run([*TRAIN, *options], tmp_path)
    run = run_folder(tmp_path, done)
    assert json.loads((run / "storage.json").read_text()) == {"url": f"memory://runs/{run.name}"}
    assert "copied to memory://runs/mine-" in done.stderr
    assert events(run, "fault") == []


def test_torchrun_goes_on_from_an_address(s3, tmp_path):
    module = [*commands.TORCHRUN, "-m", "syncnorm", "train", "digits", *SHORT]
    done = commands.run(module, tmp_path, s3)
    run = run_folder(tmp_path, done)
    empty = tmp_path / "empty"
    empty.mkdir()
    again = commands.run([*module, "--resume", f"s3://{BUCKET}/runs/{run.name}"], empty, s3)
    assert events(run_folder(empty, again), "step") == events(run, "step")


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
