"""The command's answer to bad input: one message, exit status 2, no traceback, nothing started."""

import pytest

from syncnorm.cli import main
from tests.launch import commands


@pytest.fixture
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "no configuration 'missing.yaml'. Packed ones, by name: "),
        (["digits", "train.epoch=1"], "`train.epoch` is not a key. The nearest key is `train.epochs`."),
        (["digits", "train.epochs=many"], "`train.epochs` must be a valid integer"),
        (["digits", "run_dir=taken"], "`run_dir` must be a folder that can be written to, got 'taken'"),
        (["digits", "launch.device=cuda", "launch.workers=99"], "`launch.device` must be auto or cpu where 99 workers"),
    ],
)
def test_bad_input(arguments, message, in_empty_folder, capsys):
    (in_empty_folder / "taken").write_text("a file")
    with pytest.raises(SystemExit) as caught:
        main(["train", *arguments])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("syncnorm: ")
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in in_empty_folder.iterdir()] == ["taken"]


@pytest.mark.parametrize("arguments", [["train"], ["tarin", "digits"], ["train", "digits", "--epochs", "3"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "Usage" in capsys.readouterr().err


def test_half_an_environment(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as caught:
        main(["train", "digits"])
    assert caught.value.code == 2
    assert "environment variable WORLD_SIZE must be a number where RANK is set, got ''" in capsys.readouterr().err


def test_the_real_command(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {name: digits_resnet}\ntrian: {}\n")
    done = commands.run([*commands.SYNCNORM, "train", "mine.yaml"], tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "syncnorm: mine.yaml: 3 problems\n"
        "  `data` is missing\n"
        "  `train` is missing\n"
        "  `trian` is not a key. The nearest key is `train`.\n"
    )
