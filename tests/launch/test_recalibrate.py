"""The command `syncnorm recalibrate` on the folder of a real run."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from syncnorm.train.checkpoint.snapshot import Snapshot
from syncnorm.train.checkpoint.store import CheckpointStore
from tests.launch import commands


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of renormalisation with hidden pooling, one epoch long."""
    folder = tmp_path_factory.mktemp("recalibrate")
    short = ["train.epochs=1", "train.global_batch=128", "train.ema=0.5"]
    done = commands.run([*commands.SYNCNORM, "train", "digits_renorm", *short], folder)
    assert done.returncode == 0, done.stderr
    assert "running statistics: equal on 2 workers" in done.stdout
    return folder / done.stdout.splitlines()[-1]


def newest(folder: Path) -> Snapshot:
    snapshot, _, faults = CheckpointStore(folder).newest()
    assert snapshot is not None
    assert not faults
    return snapshot


def running(snapshot: Snapshot, prefix: str = "", name: str = "model") -> dict[str, torch.Tensor]:
    tensors = snapshot.tensors[name]
    return {
        k.removeprefix(prefix): v
        for k, v in tensors.items()
        if "running" in k and k.startswith(prefix)
    }


def test_a_new_checkpoint_beside_the_old_one(run, tmp_path, capsys):
    called = commands.call(capsys, "recalibrate", str(run))
    assert called.status == 0
    accuracy, loss, last = called.out.splitlines()
    assert accuracy.startswith("test accuracy ")
    assert loss.startswith("test loss ")
    assert Path(last) == run / "recalibrated" / "step-00000012"
    old, new = newest(run / "checkpoints"), newest(run / "recalibrated")
    assert new.tensors.keys() == {"model"}
    # Of the average, which is what the run evaluates.
    average = {
        k.removeprefix("module."): v
        for k, v in old.tensors["ema"].items()
        if k.startswith("module.")
    }
    assert new.tensors["model"].keys() == average.keys()
    assert all(
        torch.equal(new.tensors["model"][k], v) for k, v in average.items() if "running" not in k
    )
    # It has had statistics of its own since it was judged last, of the same samples.
    name = "bn1.running_mean"
    torch.testing.assert_close(new.tensors["model"][name], average[name])
    assert not torch.equal(average[name], old.tensors["model"][name])

    alone = running(new)
    done = commands.run([*commands.TORCHRUN, "-m", "syncnorm", "recalibrate", str(run)], tmp_path)
    assert done.returncode == 0, done.stderr
    for name, value in running(newest(run / "recalibrated")).items():
        torch.testing.assert_close(value, alone[name], rtol=1e-6, atol=1e-7)


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(run, monkeypatch, capsys):
    monkeypatch.setattr("syncnorm.run.recalibrate.os.access", lambda path, mode: False)
    called = commands.call(capsys, "recalibrate", str(run))
    assert called.status == 2
    assert "must be writable, for the new checkpoint" in called.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "run 'missing' has no config.yaml. Name the folder of a run."),
        (["--mix", "0", "missing"], "`--mix` must be in (0, 1], got 0.0."),
    ],
)
def test_bad_input(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    called = commands.call(capsys, "recalibrate", *arguments)
    assert called.status == 2
    assert message in called.err


def test_code_of_a_package_that_is_allowed(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("digits_resnet", "tests.train.nets:same_net"))
    called = commands.call(capsys, "recalibrate", str(folder), "--allow", "tests")
    assert called.status == 0
    assert called.out.splitlines()[-1] == str(folder / "recalibrated" / "step-00000012")

    (folder / "config.yaml").write_text(
        text.replace("name: digits\n", "name: tests.train.nets:fails\n")
    )
    called = commands.call(capsys, "recalibrate", str(folder), "--allow", "tests")
    assert called.status == 1
    err = called.err
    assert err.startswith("syncnorm: worker 0 failed: IndexError: index 7 is out of bounds")
    assert re.search(r"\(.*/nets.py, line \d+, in fails\)\n$", err)
    assert err.count("\n") == 1


def test_what_was_recalibrated_last_is_the_recalibrated_one(run, tmp_path, capsys):
    """Also where one of a later step, which is damaged now, was recalibrated before."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    later = CheckpointStore(folder / "recalibrated").write(
        replace(newest(folder / "checkpoints"), step=99)
    )
    called = commands.call(capsys, "recalibrate", str(folder))
    assert called.status == 0
    (found,) = (path for path in later.parent.iterdir() if path.name.startswith("step-"))
    assert found == later.with_name("step-00000012")


def no_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")


def damage(folder: Path) -> None:
    with (folder / "checkpoints" / "step-00000012" / "model.safetensors").open("r+b") as file:
        file.seek(1000)
        file.write(b"x")


def another_model(folder: Path) -> None:
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("digits_resnet", "resnet18_cifar"))


def code(folder: Path) -> None:
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("digits_resnet", "os:system"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_checkpoints, "has no checkpoints. Name the folder of a run that has saved one."),
        (damage, "model.safetensors` must have the SHA-256"),
        (another_model, "checkpoints: does not fit the run's configuration: "),
        (
            code,
            "`model.name` must name a callable of a package that is allowed, got 'os:system'. To "
            "run its code, add",
        ),
    ],
)
def test_a_run_that_is_none(spoil, message, run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    spoil(folder)
    called = commands.call(capsys, "recalibrate", str(folder))
    assert called.status == 2
    err = called.err
    assert message in err
    assert err.count("\n") == 1
    assert newest(run / "checkpoints").step == 12
