"""The command `syncnorm merge` on the folders of real runs."""

from __future__ import annotations

import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch

import syncnorm
from syncnorm.merge import interpolate, match_weights
from syncnorm.run.folder import write_config
from syncnorm.train.config.file import load_config
from tests.launch import commands
from tests.launch.commands import call
from tests.train import runs


@pytest.fixture(scope="module")
def made(pool, tmp_path_factory) -> list[Path]:
    """Two runs of different seeds, one worker each; and one that says it is of another model."""
    root = tmp_path_factory.mktemp("merge")
    folders = []
    for seed, name in enumerate("ab"):
        config = load_config("digits", ["train.epochs=3", f"train.seed={seed}"])
        folder = root / name
        folder.mkdir()
        write_config(config, folder)
        pool(1).run(runs.train_sections, str(folder), config.model_dump())
        folders.append(folder)
    shutil.copytree(folders[0], root / "c")
    text = (root / "c" / "config.yaml").read_text()
    (root / "c" / "config.yaml").write_text(text.replace("digits_resnet", "resnet18_cifar"))
    folders.append(root / "c")
    return folders


def _accuracies(out: str) -> list[float]:
    (found,) = (
        re.fullmatch(r"test accuracy ([\d.]+) % and ([\d.]+) %, merged ([\d.]+) %", line)
        for line in out.splitlines()
        if "accuracy" in line
    )
    assert found is not None
    return [float(each) for each in found.groups()]


def test_a_merged_run_is_a_run(made, tmp_path, capfd):
    a, b, _ = made
    output = tmp_path / "merged"
    status, out, err = call(capfd, "merge", a, b, "-o", output, "--alpha", "0.25")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == str(output)
    first, second, merged = _accuracies(out)
    assert min(first, second) > 80

    networks = [syncnorm.load(each).network for each in (a, b, output)]
    expected = interpolate(networks[0], match_weights(*networks[:2]), 0.25).state_dict()
    got = networks[2].state_dict()
    assert got.keys() == expected.keys()
    differing = {name for name, value in got.items() if not torch.equal(value, expected[name])}
    assert differing == {name for name in got if "running" in name}

    status, out, err = call(capfd, "evaluate", output, "--json")
    assert (status, err) == (0, "")
    assert 100 * json.loads(out)["metrics"]["accuracy"] == pytest.approx(merged, abs=0.006)

    resumed = commands.run([*commands.SYNCNORM, "train", "--resume", str(output)], tmp_path)
    assert resumed.returncode == 2
    assert "got one that was merged. To train its model further" in resumed.stderr


def test_on_two_workers_without_matching(made, tmp_path, capfd):
    a, b, _ = made
    status, out, _ = call(capfd, "merge", a, b, "-o", tmp_path / "one", "--no-match")
    assert status == 0
    words = ["-m", "syncnorm", "merge", a, b, "-o", tmp_path / "two", "--no-match"]
    done = commands.run([*commands.TORCHRUN, *map(str, words)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert _accuracies(done.stdout) == _accuracies(out)
    one, two = (syncnorm.load(tmp_path / name).network.state_dict() for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6)


def test_a_run_merged_with_itself_stays_what_it_is(made, tmp_path, capfd):
    output = tmp_path / "merged"
    status, out, _ = call(capfd, "merge", made[0], made[0], "-o", output)
    assert status == 0
    first, second, merged = _accuracies(out)
    assert first == second
    assert abs(merged - first) < 5


def test_a_disk_without_room_leaves_nothing(made, tmp_path, capfd):
    """A limit of a file's size fails a write as a full disk does."""
    merged, exported = tmp_path / "merged", [tmp_path / "a.safetensors", tmp_path / "a.pt2"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, before[1]))
    try:
        failed, _, merging = call(capfd, "merge", made[0], made[1], "-o", merged)
        exporting = [call(capfd, "export", made[0], "-o", each) for each in exported]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert failed == 1
    assert "File too large" in merging
    for path, (refused, _, said) in zip(exported, exporting, strict=True):
        assert refused == 2
        assert f"got '{path}': File too large" in said
    assert not list(tmp_path.iterdir())


def test_bad_input(made, tmp_path, capfd):
    a, b, c = made
    (tmp_path / "file").touch()
    made_in = tmp_path / "file" / "x"
    refused = {
        (
            a,
            b,
            "-o",
            made_in,
        ): f"must be a folder that can be made, got '{made_in}': Not a directory",
        (a, b, "-o", a): f"`--output` must be a new folder, got '{a}', which is there",
        (a, b, "-o", tmp_path / "x", "--alpha", "2"): "`--alpha` must be in [0, 1], got 2.0",
        (a, c, "-o", tmp_path / "x"): f"runs '{a}' and '{c}' must be of one `model`",
        (a, tmp_path / "y", "-o", tmp_path / "x"): "has no config.yaml",
    }
    for arguments, message in refused.items():
        status, _, err = call(capfd, "merge", *arguments)
        assert status == 2
        assert message in err
    assert not (tmp_path / "x").exists()
