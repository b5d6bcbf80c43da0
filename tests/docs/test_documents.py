"""What the documents say can be run runs, and what they name exists."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
# --standalone: a free port instead of torchrun's fixed one
TORCHRUN = ["torchrun", "--standalone"]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def _run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_readme_example_runs_as_it_stands(tmp_path):
    example, _ = _blocks("python")
    assert len([line for line in example.splitlines() if line]) <= 14
    (tmp_path / "example.py").write_text(example)
    # A file for each worker's output, which would mingle on one screen.
    _run(
        [*TORCHRUN, "--nproc-per-node", "2", "--redirects", "1", "--log-dir", "logs", "example.py"],
        tmp_path,
    )
    first, second = (
        next(tmp_path.glob(f"logs/*/attempt_0/{rank}/stdout.log")).read_text() for rank in (0, 1)
    )
    assert re.fullmatch(r"0 tensor\(.*\)\s*", first, flags=re.DOTALL)
    assert first.removeprefix("0") == second.removeprefix("1")


def run_the_block_on_a_model_that_exists() -> str:
    """On a worker: the second block of the README, with what it takes for granted."""
    names = {
        "DistributedDataParallel": DistributedDataParallel,
        "model": nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),
        "sample": torch.zeros(2, 3, 8, 8),
    }
    exec(_blocks("python")[1], names)
    return repr(names["model"])


def test_the_readme_block_on_a_model_that_exists_runs(pool):
    one, other = pool(2).run(run_the_block_on_a_model_that_exists)
    assert one == other
    assert "SyncBatchNorm(8" in one


def _training_commands() -> list[str]:
    lines = [
        line.split("#")[0].strip() for block in _blocks("console") for line in block.splitlines()
    ]
    commands = [
        line for line in lines if "digits" in line and not line.startswith("syncnorm submit")
    ]
    assert len(commands) == 4
    return commands


@pytest.mark.parametrize("command", _training_commands())
def test_the_readme_commands_run(command, tmp_path):
    """As they stand, but for one epoch, a folder of their own and a free port."""
    short = ["train.epochs=1", f"run_dir={tmp_path}"]
    words = shlex.split(command)
    out = _run([*(TORCHRUN if words[0] == "torchrun" else words[:1]), *words[1:], *short], ROOT)
    assert re.search(r"^test accuracy \d+\.\d\d %$", out, flags=re.MULTILINE)


def test_the_tests_that_prove_guarantees_exist():
    named = re.findall(r"`(tests/\S+?\.py)(?:::(\w+))?`", README)
    assert len(named) >= 10
    for file, function in named:
        assert f"def {function}" in (ROOT / file).read_text(), (file, function)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_and_files_exist(document):
    text = document.read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (document.parent / target).exists(), target
    for path in re.findall(
        r"`((?:syncnorm|tests|benchmarks|configs|launch|docs|docker)/[\w./-]+\.\w+)", text
    ):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    "name",
    [
        "functional",
        "layers",
        "comm.exchange",
        "maths.renorm",
        "model.accumulate",
        "model.monitor",
        "model.recalibrate",
        "model.convert.convert",
        "model.adopt",
        "model.convert.adapters",
    ],
)
def test_docstring_examples(name):
    names = {"torch": importlib.import_module("torch")}
    results = doctest.testmod(importlib.import_module(f"syncnorm.{name}"), extraglobs=names)
    assert results.attempted > 0
    assert results.failed == 0
