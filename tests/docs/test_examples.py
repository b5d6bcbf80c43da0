"""Each example runs by the command in its docstring, and does what it says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def _run(name: str, *arguments: str, workers: int | None = None) -> str:
    """By the first command of its docstring, with this Python, and a free port instead of
    torchrun's fixed one.
    """
    text = (ROOT / "examples" / name).read_text()
    command = shlex.split(re.search(r"^    ((?:torchrun|python) .*)$", text, flags=re.MULTILINE)[1])
    assert any(part.startswith(f"examples/{name.removesuffix('.py')}.") for part in command)
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    started = [
        sys.executable,
        *(torchrun if command[0] == "torchrun" else []),
        *command[1:],
        *arguments,
    ]
    if workers is not None:
        started[started.index("--nproc-per-node") + 1] = str(workers)
    done = subprocess.run(
        started, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _accuracies(output: str) -> list[float]:
    return [float(number) for number in re.findall(r"(\d+\.\d\d) %", output)]


def test_ddp():
    (accuracy,) = _accuracies(_run("ddp.py", workers=2))
    assert accuracy > 85.0


@pytest.mark.slow  # its notebook is not: it has the same lines
def test_finetune_convert():
    output = _run("finetune_convert.py")
    pretrained, plain, renormalised, loaded = _accuracies(output)
    assert pretrained < 60.0 < min(plain, renormalised)
    assert loaded == renormalised
    assert "SyncBatchRenorm" in output
    assert output.splitlines()[-1].count("BatchNorm2d(16,")


@pytest.mark.slow
def test_lightning_digits():
    pytest.importorskip("lightning", reason="lightning is not installed")
    output = _run("lightning_digits.py")
    assert "after fitting: BatchNorm2d(16," in output
    assert _accuracies(output)[0] > 80.0


@pytest.mark.slow
def test_accelerate_digits():
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    (accuracy,) = _accuracies(_run("accelerate_digits.py"))
    assert accuracy > 80.0


@pytest.mark.slow
def test_hf_trainer_digits():
    pytest.importorskip("transformers", reason="transformers is not installed")
    (accuracy,) = _accuracies(_run("hf_trainer_digits.py"))
    assert accuracy > 75.0


def _trained(example: str, folder: Path, metric: str) -> float:
    """Train a task of its own on two workers; the metric on the test set, in per cent."""
    output = _run(example, f"run_dir={folder}")
    assert "running statistics: equal on 2 workers" in output
    (line,) = re.findall(rf"^test {metric} .*$", output, flags=re.MULTILINE)
    (value,) = _accuracies(line)
    return value


@pytest.mark.slow
def test_detection(tmp_path):
    assert _trained("detection.py", tmp_path, "f1") > 80.0


@pytest.mark.slow
def test_segmentation(tmp_path):
    assert _trained("segmentation.py", tmp_path, "mean iou") > 90.0


@pytest.mark.slow
def test_crossq_pendulum():
    pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
    output = _run("crossq_pendulum.py")
    assert "CrossQRenorm(" in output
    before, after = (
        float(r) for r in re.findall(r"episode return \w+ 2500 steps: (-?\d+)", output)
    )
    assert after > before + 300.0


def test_every_example_has_a_test():
    assert {f"test_{path.stem}" for path in EXAMPLES} <= globals().keys()
