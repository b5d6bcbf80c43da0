"""The documents' blocks and commands run, and the files, tests and figures they name exist."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.nn.modules import _functions
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset
from typer.core import TyperGroup
from typer.main import get_command

import syncnorm
from benchmarks import bars
from syncnorm.cli import app
from syncnorm.errors import ConfigError
from syncnorm.run.ray.space import read_space
from syncnorm.train.config.file import load_config
from tests.launch import commands
from tests.launch.record import digests, run_folder
from tests.train.runs import events
from tests.unit.test_evaluated_layouts import gradients_in_evaluation

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
GUARANTEES = (ROOT / "docs" / "guarantees.md").read_text()
RESULTS = "\n".join(path.read_text() for path in (ROOT / "docs" / "results").glob("*.md"))
BIN = Path(sys.executable).parent
DOCUMENTS = [
    *(
        ROOT / name
        for name in (
            "README.md",
            "CONTRIBUTING.md",
            "CHANGELOG.md",
            "SECURITY.md",
            "launch/README.md",
        )
    ),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PAGES = ["computed", "ddp", "failures", "family", "merge", "sampler"]


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def _run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    # Without it torchrun says that it sets it.
    environment = {"OMP_NUM_THREADS": "1"}
    if command[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", *command[1:]]
        # Its workers are new Pythons then, which have to come to their end, too.
        environment["PYTHONPATH"] = str(ROOT)
    else:
        words = [str(BIN / command[0]), *command[1:]]
    done = commands.run(words, cwd, environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_readme_is_short_and_says_at_once_how_to_install():
    assert len(README.split()) <= 900
    assert "pip install" in "\n".join(README.splitlines()[:20])


def test_the_readme_example_runs_as_it_stands(tmp_path):
    (example,) = _blocks(README, "python")
    assert len([line for line in example.splitlines() if line]) <= 14
    (tmp_path / "example.py").write_text(example)
    # A file for each worker's output, which would mingle on one screen.
    options = ["--nproc-per-node", "2", "--redirects", "1", "--log-dir", "logs"]
    _run(["torchrun", *options, "example.py"], tmp_path)
    first, second = (
        next(tmp_path.glob(f"logs/*/attempt_0/{rank}/stdout.log")).read_text() for rank in (0, 1)
    )
    assert re.fullmatch(r"0 tensor\(.*\)\s*", first, flags=re.DOTALL)
    assert first.removeprefix("0") == second.removeprefix("1")


def run_the_blocks(page: str) -> str:
    """On a worker: the page's Python blocks one after the other, with what they take for granted."""
    batches = [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)) for _ in range(2)]
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 2))
    model = plain if page in ("family", "ddp") else syncnorm.prepare_ddp(syncnorm.convert(plain))
    names = {name: getattr(syncnorm, name) for name in syncnorm.__all__} | {
        "DistributedDataParallel": DistributedDataParallel,
        "syncnorm": syncnorm,
        "model": model,
        "a": model,
        "b": model,
        "layer": syncnorm.SyncBatchNorm(3),
        "sample": batches[0][0],
        "batches": batches,
        "micro_batches": batches,
        "images": batches[0][0],
        "class_loss": torch.ones((), requires_grad=True),
        "box_loss": torch.full((), torch.nan, requires_grad=True),
        "number_of_boxes": 0,
        "dist": torch.distributed,
        "torch": torch,
        "evaluate": lambda model: model(batches[0][0]).sum(),
        "path": os.devnull,
        "criterion": F.cross_entropy,
        "contrast": lambda rows, _, keys, __: (rows @ keys.T).mean(),
        "dataset": TensorDataset(torch.randn(100, 3, 8, 8), torch.zeros(100, dtype=torch.long)),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "contextlib": contextlib,
        "size": len,
    }
    blocks = _blocks((ROOT / "docs" / f"{page}.md").read_text(), "python")
    for block in blocks:
        exec(compile(block, f"docs/{page}.md", "exec"), names)
        if isinstance(names["model"], DistributedDataParallel):
            names["ddp_model"] = names["model"]
            names["optimizer"] = torch.optim.SGD(names["model"].parameters(), lr=0.1)
    return f"{len(blocks)} {names['model']}"


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_blocks_run(page, pool):
    one, other = pool(2).run(run_the_blocks, page)
    assert one == other
    blocks = dict(zip(PAGES, "281222", strict=True))
    assert one[0] == blocks[page]
    assert ("BatchRMSNorm(8" if page == "family" else "SyncBatchNorm(8") in one


def _training_commands() -> list[str]:
    """The README's and launch/README.md's, but for those that need a cluster."""
    lines = [
        line.split("#")[0].strip()
        for block in _blocks(README, "console")
        for line in block.splitlines()
    ]
    lines += re.findall(r"`(torchrun [^`]+)`", (ROOT / "launch" / "README.md").read_text())
    commands = [
        line for line in lines if "digits" in line and not line.startswith("syncnorm submit")
    ]
    assert len(commands) == 3
    return commands


SHORT = ["train.epochs=1", "train.global_batch=128"]


@pytest.fixture(scope="module")
def local(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """`syncnorm train digits` on two workers, in short."""
    folder = tmp_path_factory.mktemp("local")
    return folder, commands.run([*commands.SYNCNORM, "train", "digits", *SHORT], folder)


@pytest.mark.parametrize("command", _training_commands())
def test_the_documented_training_commands_run(command, tmp_path, local):
    """As they stand, but for one epoch and a folder of their own. Under torchrun it is the same
    run as without.
    """
    words = [*shlex.split(command), *SHORT, f"run_dir={tmp_path}"]
    done = _run(words, ROOT)
    assert re.search(r"^test accuracy \d+\.\d\d %$", done.stdout, flags=re.MULTILINE)
    if words[0] == "torchrun":
        assert digests(done.stdout) == digests(local[1].stdout) != []
        run = run_folder(tmp_path, done)
        assert events(run, "step") == events(run_folder(*local), "step")
        assert done.stderr.count("2 workers on cpu\nmodel: digits_resnet, ") == 1
        exit_note = json.loads((run / "exit.json").read_text())
        assert (exit_note["status"], exit_note["step"]) == ("done", 12)


def test_a_model_and_data_of_your_own_as_the_page_says(tmp_path):
    text = (ROOT / "docs" / "train.md").read_text()
    (block,), (command,) = _blocks(text, "python"), _blocks(text, "console")
    (tmp_path / "mine.py").write_text(block)
    out = _run([*shlex.split(command), "--dry-run"], tmp_path).stdout
    assert "model: mine:model, 258 parameters trained, 1 layer of syncnorm's" in out
    assert "data: 192 training and 64 test images of 3x16x16" in out


def _commands(document: Path) -> list[list[str]]:
    """The page's commands of ours, as words."""
    return [
        shlex.split(line, comments=True)[1:]
        for block in _blocks(document.read_text(), "console")
        for line in block.splitlines()
        if line.startswith("syncnorm ")
    ]


@pytest.mark.parametrize(
    "document", [each for each in DOCUMENTS if _commands(each)], ids=lambda p: p.stem
)
def test_the_commands_are_understood(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.yaml").touch()
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    lines = _commands(document)
    if document.name == "README.md":
        assert [name for name, *_ in lines] == ["train", "submit", "report", "predict", "verify"]
    for name, *arguments in lines:
        context = group.commands[name].make_context(name, list(arguments))
        if context.params.get("config") == "digits" and name == "train":
            load_config("digits", context.params["overrides"] or [])


def test_a_command_that_is_not_understood_is_an_error():
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    with pytest.raises(Exception, match="No such option"):
        group.commands["train"].make_context("train", ["digits", "--epocs", "3"])
    with pytest.raises(ConfigError, match=r"train\.epocs"):
        load_config("digits", ["train.epocs=3"])


@pytest.mark.parametrize("page", ["weights"])
def test_the_pages_keys_are_keys(page):
    blocks = _blocks((ROOT / "docs" / f"{page}.md").read_text(), "yaml")
    assert blocks
    for block in blocks:
        keys = {
            f"{section}.{key}={json.dumps(value)}"
            for section, values in yaml.safe_load(block).items()
            for key, value in values.items()
        }
        load_config("digits", list(keys))


def test_the_sweeps_space_is_one(tmp_path):
    (block,) = _blocks((ROOT / "docs" / "sweep.md").read_text(), "yaml")
    (tmp_path / "space.yaml").write_text(block)
    assert len(read_space(tmp_path / "space.yaml").trials()) == 16


def test_a_data_set_and_a_task_of_ones_own_are_what_the_trainer_takes():
    data, task = (
        {"F": F, "Scans": lambda path: TensorDataset(torch.arange(4.0 if path.name else 0))}
        for _ in range(2)
    )
    for page, names in (("data", data), ("tasks", task)):
        for block in _blocks((ROOT / "docs" / f"{page}.md").read_text(), "python"):
            exec(compile(block, f"docs/{page}.md", "exec"), names)
    assert data["net"](4, 3, nn.BatchNorm1d)(torch.eye(4)).shape == (4, 3)
    splits = data["load"](Path("scans")).check()
    assert (len(splits.train), splits.num_classes) == (4, 5)
    batch = torch.eye(3), torch.tensor([0, 1, 1])
    labels = task["Labels"]()
    loss, count = labels.loss(nn.Identity(), batch)
    assert (count, loss.shape) == (3, ())
    right, of = labels.metrics(nn.Identity(), batch)[labels.best]
    assert (int(right), of) == (2, 3)


def test_every_page_with_python_has_a_test_that_runs_it():
    """Here, or in the file beside its name."""
    elsewhere = {
        "diagnose": "diagnose/test_measures.py",
        "fit": "launch/test_fit.py",
        "loggers": "train/test_loggers.py",
        "migrate": "docs/test_migrate.py",
        "recipes": "docs/test_recipes.py",
        "tutorial": "docs/test_tutorial.py",
        "use": "launch/test_use.py",
        "cuda": "model/test_budgets.py",
    }
    have = {path.stem for path in DOCUMENTS if "```python\n" in path.read_text()}
    assert have - {"README"} == {*PAGES, "train", "data", "tasks", *elsewhere}
    for page, file in elsewhere.items():
        text = (ROOT / "tests" / file).read_text()
        assert re.search(rf"docs/{page}\.md|\"docs\" / \"{page}\.md\"", text), file


# All of their tests together show what a guarantee says.
WHOLE_FILES = (
    "test_checkpoint_kills.py",
    "test_elastic.py",
    "test_identity.py",
    "test_invariance.py",
    "test_malformed.py",
    "test_native.py",
    "test_no_waiting.py",
    "test_ray_drill.py",
    "test_resnet.py",
    "test_what_torchs_suite_checks.py",
)


def _guaranteed(readme: str) -> str:
    (section,) = re.findall(r"^## What is guaranteed$(.*?)^## ", readme, re.MULTILINE | re.DOTALL)
    return section


def _proofs(text: str) -> list[tuple[str, str]]:
    """File from the root and function, or no function, of each link to a test."""
    links = re.findall(r"\[`([^`]+)`\]\((?:\.\./)?(tests/[^)]+\.py)\)", text)
    return [(file, words.partition("::")[2] if ".py" in words else words) for words, file in links]


def test_the_tests_that_prove_guarantees_exist():
    assert len(_proofs(GUARANTEES)) >= 60
    assert len(_proofs(README)) >= 6
    assert set(_proofs(README)) <= set(_proofs(GUARANTEES))
    for file, function in _proofs(GUARANTEES):
        if function:
            assert f"def {function}(" in (ROOT / file).read_text(), (file, function)
        else:
            assert Path(file).name in WHOLE_FILES, file
    for row in re.findall(r"^\| .* \|$", _guaranteed(README) + GUARANTEES, flags=re.MULTILINE):
        assert row == "| guarantee | test |" or _proofs(row), row

    for words, file in re.findall(r"\[`([^`:]+\.py)[^`]*`\]\(([^)]+)\)", GUARANTEES):
        assert words == Path(file).name, (words, file)


def test_the_readmes_figures_are_those_of_the_results():
    rows = [line for line in README.splitlines() if re.search(r"\| \d\.\d\d \[", line)]
    assert len(rows) == 4
    for row in rows:
        assert row.removesuffix("|") in RESULTS, row
    values = bars.accuracies(RESULTS)
    assert bars.PICTURE.read_text() == bars.draw(values)
    local, *_, pooled = (values[row] for row in bars.ROWS)
    assert f"local batch norm {local} %, pooled {pooled} %" in README
    for command in re.findall(r"`python -m (benchmarks\.\w+)", README):
        assert f"    python -m {command}" in RESULTS
        assert (ROOT / f"{command.replace('.', '/')}.py").exists()


def test_torchs_layer_is_as_the_table_says(pool):
    """What can be seen without a GPU, of the table in docs/computed.md."""
    for forward, wrapping in pool(2).run(words_of_torchs_layer):
        assert forward.startswith("SyncBatchNorm expected input tensor to be on GPU")
        assert wrapping == "SyncBatchNorm layers only work with GPU modules"
    assert list(inspect.signature(nn.SyncBatchNorm.forward).parameters) == ["self", "input"]
    source = inspect.getsource(_functions.SyncBatchNorm.forward)
    for line in ("dist.all_gather(", "dtype=mean.dtype", "counts = counts.to(running_mean.dtype)"):
        assert line in source
    x = torch.randn(4, 3, 5).permute(2, 0, 1).unsqueeze(0)
    assert gradients_in_evaluation(nn.BatchNorm2d(5), x, torch.randn(x.shape))[2] > 1
    backward = inspect.getsource(_functions.SyncBatchNorm.backward)
    assert re.search(r"if self.needs_input_grad\[0\]:[^}]*?all_reduce", backward)


def words_of_torchs_layer() -> tuple[str, str]:
    """On a worker with a CPU: the errors of a training forward, and of DDP."""
    layer = nn.SyncBatchNorm(3)
    with pytest.raises(ValueError) as forward:  # noqa: PT011
        layer(torch.randn(4, 3, 2))
    with pytest.raises(ValueError) as wrapping:  # noqa: PT011
        DistributedDataParallel(nn.Sequential(nn.Conv1d(3, 3, 1), layer))
    return str(forward.value), str(wrapping.value)


def _anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_files_exist(document):
    text = document.read_text()
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        file = document.parent / target if target else document
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file.read_text()), (target, anchor)
    for path in re.findall(
        r"`((?:syncnorm|tests|benchmarks|drills|examples|configs|launch|docs|docker)/[\w./-]+\.\w+)",
        text,
    ):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"-m ((?:syncnorm|benchmarks|drills|tests)(?:\.\w+)*)", text):
        file = ROOT / module.replace(".", "/")
        assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), module


@pytest.mark.parametrize(
    "name",
    [
        "functional",
        "layers",
        "comm.debug",
        "comm.rules",
        "comm.tally",
        "family.mabn",
        "family.plain.fixup",
        "maths.renorm",
        "model.accumulate",
        "model.evaluation",
        "model.explain",
        "model.frozen",
        "model.gather",
        "model.join.join",
        "model.monitor",
        "model.norm_parameters",
        "model.recalibrate",
        "model.sampler",
        "model.sharpness",
        "model.convert.convert",
        "merge.interpolate",
        "model.adopt",
        "model.convert.adapters",
    ],
)
def test_docstring_examples(name):
    names = {"torch": importlib.import_module("torch")}
    results = doctest.testmod(importlib.import_module(f"syncnorm.{name}"), extraglobs=names)
    assert results.attempted > 0
    assert results.failed == 0
