"""The command `syncnorm recalibrate` on the folder of a real run."""

from pathlib import Path

import pytest
import torch

from syncnorm.cli import main
from tests.launch import commands


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of renormalisation with hidden pooling, one epoch long."""
    folder = tmp_path_factory.mktemp("recalibrate")
    short = ["train.epochs=1", "train.global_batch=128"]
    done = commands.run([*commands.SYNCNORM, "train", "digits_renorm", *short], folder)
    assert done.returncode == 0, done.stderr
    assert "running statistics: equal on all 2 workers" in done.stdout
    return folder / done.stdout.splitlines()[-1]


def _buffers(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in torch.load(path, weights_only=True)["model"].items() if "running" in k}


def test_a_new_checkpoint_beside_the_old_one(run, tmp_path):
    before = (run / "checkpoint.pt").read_bytes()
    done = commands.run([*commands.SYNCNORM, "recalibrate", str(run)], tmp_path)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first.startswith("test accuracy ")
    assert Path(last) == run / "checkpoint-recalibrated.pt"
    assert (run / "checkpoint.pt").read_bytes() == before
    old, new = torch.load(run / "checkpoint.pt", weights_only=True), torch.load(last, weights_only=True)
    assert new.keys() == old.keys()
    assert all(torch.equal(new["model"][k], v) for k, v in old["model"].items() if "running" not in k)
    assert not torch.equal(new["model"]["bn1.running_mean"], old["model"]["bn1.running_mean"])

    alone = _buffers(run / "checkpoint-recalibrated.pt")
    done = commands.run([*commands.TORCHRUN, "-m", "syncnorm", "recalibrate", str(run)], tmp_path)
    assert done.returncode == 0, done.stderr
    for name, value in _buffers(run / "checkpoint-recalibrated.pt").items():
        torch.testing.assert_close(value, alone[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "run 'missing' has no config.yaml. Name the folder of a finished run."),
        (["--mix", "0", "missing"], "`--mix` must be in (0, 1], got 0.0."),
    ],
)
def test_bad_input(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["recalibrate", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"not a checkpoint", "checkpoint.pt: cannot be loaded"), (None, "checkpoint.pt: does not fit the run's")],
)
def test_a_checkpoint_that_is_none(content, message, run, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    if content is None:
        torch.save({"model": {}}, tmp_path / "checkpoint.pt")
    else:
        (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        main(["recalibrate", str(tmp_path)])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "checkpoint.pt"}
