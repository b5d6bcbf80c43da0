"""The examples' notebooks are made of the scripts, and run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

from tools import notebooks

ROOT = Path(__file__).parents[2]


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write the notebook, run what was written, and return what its cells print."""
    (path,) = (each for each in notebooks.write(folder) if each.stem == name)
    made = nbformat.read(path, as_version=4)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    client = nbclient.NotebookClient(
        made, timeout=900, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    printed = [
        each.text for cell in made.cells for each in cell.get("outputs", []) if "text" in each
    ]
    return "".join(printed)


def accuracies(output: str) -> list[float]:
    return [float(number) for number in re.findall(r"(\d+\.\d\d) %", output)]


@pytest.mark.parametrize("script", notebooks.scripts(), ids=lambda path: path.stem)
def test_a_notebook_has_the_scripts_words_and_code(script):
    made = notebooks.notebook(script.read_text())
    nbformat.validate(made)
    assert made.cells[0].cell_type == "markdown"
    code = "\n".join(each.source for each in made.cells if each.cell_type == "code")
    body = ast.parse(script.read_text()).body[1:]  # but the docstring
    assert list(map(ast.unparse, ast.parse(code).body)) == list(map(ast.unparse, body))
    assert len([each for each in made.cells if each.cell_type == "code"]) >= 3


def test_finetune_convert(tmp_path, monkeypatch):
    output = run("finetune_convert", tmp_path, monkeypatch)
    pretrained, plain, renormalised, loaded = accuracies(output)
    assert pretrained < 60.0 < min(plain, renormalised)
    assert loaded == renormalised


@pytest.mark.slow
@pytest.mark.parametrize(("name", "metric"), [("segmentation", "mean_iou"), ("detection", "f1")])
def test_the_trainers(name, metric, tmp_path, monkeypatch):
    output = run(name, tmp_path, monkeypatch)
    value = re.search(rf"'{metric}': (\d\.\d+)", output)
    assert value is not None, output
    assert float(value[1]) > 0.8


@pytest.mark.slow
def test_crossq_pendulum(tmp_path, monkeypatch):
    pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
    output = run("crossq_pendulum", tmp_path, monkeypatch)
    before, after = (float(r) for r in re.findall(r"return \w+ \d+ steps: (-?\d+)", output))
    assert after > before + 300.0


def test_every_notebook_has_a_test():
    tested = {"finetune_convert", "segmentation", "detection", "crossq_pendulum"}
    assert {each.stem for each in notebooks.scripts()} == tested
