"""`python -m benchmarks.gpu` where there is no GPU: every part runs, and what is found is kept."""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.gpu import layers, machine, part, primitives, step, table, timing
from syncnorm.train.models import MODELS

command = importlib.import_module("benchmarks.gpu.__main__")


@pytest.fixture
def settings(tmp_path) -> part.Settings:
    return part.Settings(tmp_path / "rows.jsonl", device="cpu", is_small=True)


def test_the_shapes_are_those_of_the_network():
    found: Counter[tuple[int, ...]] = Counter()

    def norm(channels: int) -> torch.nn.Module:
        layer = torch.nn.BatchNorm2d(channels)
        layer.register_forward_pre_hook(lambda _, args: found.update([tuple(args[0].shape[1:])]))
        return layer

    with torch.device("meta"):
        model = MODELS["resnet50_imagenet"](in_channels=3, num_classes=10, norm_layer=norm)
        model(torch.empty(2, 3, step.SIZE, step.SIZE))
    assert found == primitives.SHAPES
    assert found.total() == 53


def test_a_step_in_one_process(settings):
    step.measure(settings)
    _check_step(part.read_rows(settings.rows), "fake", 2)


def test_the_second_rank_that_is_nobody_takes_the_messages_of_torchs_own_layer():
    """On a GPU `torch.nn.SyncBatchNorm` gathers a row into one row of as many parts as ranks."""
    with timing.workers():
        gathered = torch.zeros(1, 6)
        dist.all_gather_into_tensor(gathered, torch.arange(3.0), None, async_op=False)
    assert gathered.tolist() == [[0.0, 1.0, 2.0] * 2]


def test_a_step_under_ddp(settings):
    """On one rank, of a group that is no stand-in."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        step.measure(settings)
    finally:
        dist.destroy_process_group()
    _check_step(part.read_rows(settings.rows), "gloo", 1)


def _check_step(rows: list[table.Row], backend: str, ranks: int) -> None:
    assert [row["layer"] for row in rows if "error" in row] == ["nn.SyncBatchNorm"]
    good = [row for row in rows if "error" not in row]
    assert [row["layer"] for row in good] == [n for n in step.NORMS if n != "nn.SyncBatchNorm"]
    assert {(row["backend"], row["ranks"]) for row in good} == {(backend, ranks)}
    assert {row["repetitions"] for row in good} == {2}
    assert good[0]["to_local"] == [1.0, 1.0, 1.0]
    text = table.render({"parts": {}, "rows": {"step": rows}})
    assert all(f"| {row['layer']} | {row['to_local'][0]:.3f} [" in text for row in good)
    assert "- no figure for nn.SyncBatchNorm: ValueError" in text


def test_small_layers(settings):
    layers.measure(settings)
    rows = part.read_rows(settings.rows)
    # torch's own refuses a CPU.
    assert {row["layer"] for row in rows if "error" in row} == {"nn.SyncBatchNorm"}
    expected = {
        (name, way)
        for way, (_, names) in layers.WAYS.items()
        for name in names
        if name != "nn.SyncBatchNorm"
    }
    text = table.render({"parts": {}, "rows": {"layers": rows}})
    assert all(f"| {name} | {way} | " in text for name, way in expected)


def test_primitives(settings):
    primitives.measure(settings)
    rows = part.read_rows(settings.rows)
    timed = Counter(row["kernels"] for row in rows if "error" not in row)
    assert timed["copy"] == 4
    assert timed["ours, portable"] == 16
    text = table.render({"parts": {}, "rows": {"primitives": rows}})
    assert "| moments | ours, portable | bfloat16 | channels last |" in text
    assert "| float32 | contiguous | 3x4x5 |" in text


@pytest.fixture(params=["ours", "ours, portable"])
def make(request) -> Iterator[Any]:
    """The primitives of one kind of kernels; those in Triton run in its interpreter."""
    with ExitStack() as stack:
        if request.param == "ours":
            pytest.importorskip("triton")
            interpreter = pytest.importorskip("tests.unit.triton_interpreter")
            stack.enter_context(interpreter.interpreted())
        yield primitives.KERNELS[request.param][0]


def test_kernels_are_given_what_a_layer_gives_them(make):
    x, g = (torch.randn(4, 3, 5, 6, dtype=torch.float64) for _ in range(2))
    weight, bias = torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    made = make(x, g, weight, bias)
    assert made.keys() == primitives.TRAFFIC.keys()
    found = {name: function() for name, function in made.items()}
    x.requires_grad_()
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=primitives.EPS)
    y.backward(g)
    normalized = found["normalize"]
    torch.testing.assert_close(normalized[0] if type(normalized) is tuple else normalized, y)
    torch.testing.assert_close(found["backward_input"], x.grad)


def test_torchs_operators_are_called_by_their_signatures():
    """They have no kernels for a CPU: it must be that, and no argument, which is refused."""
    x, row = torch.randn(4, 3, 5, 6), torch.rand(3)
    with pytest.raises(NotImplementedError, match="'aten::batch_norm_stats'"):
        primitives.torchs(x, x, row, row)
    library = torch.library.Library("aten", "IMPL")
    results = {"stats": (row,) * 2, "elemt": x, "backward_reduce": (row,) * 4, "backward_elemt": x}
    for name, result in results.items():
        library.impl(f"batch_norm_{name}", lambda *_, result=result: result, "CPU")
    try:
        made = primitives.torchs(x, x, row, row)
        assert [made[name]() for name in primitives.TRAFFIC] == [*results.values()]
    finally:
        library._destroy()


def test_a_table_of_shares():
    """Geometric means are over the large shapes, sums over all."""

    def row(shape: tuple[int, ...], share: float, median: float, size: int) -> table.Row:
        case = {"dtype": "bfloat16", "layout": "contiguous", "shape": shape, "layers": 2}
        key = {"kernels": "ours", "primitive": "moments", "bytes": size}
        return {**case, **key, "share": share, "median": median}

    large = 2 * table.LARGE_BYTES
    rows = [row((1, 2), 0.5, 2e-3, large), row((3, 4), 0.98, 1e-3, large), row((5,), 0.1, 1e-3, 9)]
    rows.append({"kernels": "ours", "primitive": "normalize", "shape": (1, 2), "error": "X: no"})
    text = table.render({"parts": {"step": "cut off"}, "rows": {"primitives": rows}})
    assert "| moments | ours | bfloat16 | contiguous | 0.70 | 0.50 1x2 | 8.00 | 3 of 3 |" in text
    assert "| all | ours | bfloat16 | contiguous |  |  | 8.00 | 1 primitives |" in text
    assert "- no figure for ours normalize (1, 2): X: no" in text
    assert "Not done: step: cut off." in text


def test_what_was_found_before_a_part_was_cut_off_is_kept(tmp_path, monkeypatch, capsys):
    """And the tests of CUDA run in a process of their own, without the project's plugins."""
    monkeypatch.setattr(command, "ENDS", {"tests": 600.0, "layers": 0.0})
    arguments = [str(tmp_path), "--device", "cpu", "--small", "--parts", "layers", "tests"]
    found = command.main(arguments)
    assert found["parts"] == {"tests": "done", "layers": "cut off when its time was over"}
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
    assert "1 passed" in found["logs"]["tests-layers"]
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.md"}
    text = (tmp_path / "gpu.md").read_text()
    assert "## Tests\n\n1 passed." in text
    assert "Not done: layers: cut off when its time was over." in text
    assert capsys.readouterr().out.strip() == text.strip()


PROGRAM = """
import os, time
import pytest

pytestmark = pytest.mark.cuda

def test_first(): pass
def test_breaks(): os._exit(3)
def test_hangs(): time.sleep(600)

@pytest.fixture
def hanging():
    yield
    time.sleep(600)

def test_ends(hanging): assert not "well"
def test_last(): pass
"""


@pytest.fixture
def run_tests(tmp_path, settings, monkeypatch):
    """run_tests(text, seconds): how the tests of a file end, and their rows."""

    def run(text: str, seconds: float) -> tuple[str, list[table.Row]]:
        (tmp_path / "test_some.py").write_text(text)
        monkeypatch.setattr(command, "test_groups", lambda: [[str(tmp_path / "test_some.py")]])
        given = replace(settings, is_small=False, until=time.monotonic() + seconds)
        (job,) = command.jobs("tests", given)
        return command.run([job]), part.read_rows(job.settings.rows)

    return run


def test_tests_go_on_after_one_that_broke_the_process_or_hung(run_tests, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p tests.unit.impatient")
    end, rows = run_tests(PROGRAM, 600.0)
    assert end == "done"
    outcomes = {row["test"].rpartition("::")[2]: row["outcome"] for row in rows if "test" in row}
    passed, broken = "passed", "not finished"
    expected = {
        "first": passed,
        "breaks": broken,
        "hangs": broken,
        "ends": "failed",
        "last": passed,
    }
    assert outcomes == {f"test_{name}": outcome for name, outcome in expected.items()}
    bad = [row["test"].rpartition("_")[2] for row in table.bad_tests(rows)]
    assert bad == ["breaks", "hangs", "ends"]
    said = table.render({"parts": {}, "rows": {"tests": rows}})
    assert "2 passed, 2 not finished, 1 failed." in said


def test_a_test_that_ends_the_process_is_bad_in_the_last_minute_too(run_tests):
    """And so is a file that cannot be read."""
    head = "import os, pytest\npytestmark = pytest.mark.cuda\n"
    for fault in ("os._exit(3)", "pytest.exit('no', 3)"):
        _, rows = run_tests(f"{head}def test_dies(): {fault}\ndef test_last(): pass", 50.0)
        assert [row["test"].rpartition("_")[2] for row in table.bad_tests(rows)] == ["dies"]
        assert "1 passed" in table.render({"parts": {}, "rows": {"tests": rows}})
    _, rows = run_tests(f"{head}def pytest_nothing(: pass", 50.0)
    assert len(table.bad_tests(rows)) == 1


def test_no_test_begins_when_the_time_is_over(run_tests, monkeypatch):
    monkeypatch.setattr(command, "GRACE", 600.0)
    end, rows = run_tests(PROGRAM, 0.0)
    assert end == command.CUT_OFF
    assert table.bad_tests(rows) == []
    said = table.render({"parts": {"tests": end}, "rows": {"tests": rows}})
    assert "4 not begun." in said
    assert f"Not done: tests: {command.CUT_OFF}." in said


def test_files_run_in_the_order_of_the_command(tmp_path):
    """Though the project has an order of its own, and tests of these names in other folders."""
    names = ["tests/cuda/test_modes.py", "tests/cuda/test_compile.py"]
    rows = shlex.quote(str(tmp_path / "rows.jsonl"))
    options = ["-o", "addopts=", "-q", "--collect-only", "-m", "cuda", f"--settings={rows}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-p", "benchmarks.gpu.outcomes", *names],
        cwd=command.ROOT, capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    files = dict.fromkeys(
        line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line
    )
    assert list(files) == names


def test_half_a_row_is_left_out(tmp_path):
    path = tmp_path / "rows"
    path.write_text('{"a": 1}\n{"b"')
    assert part.read_rows(path) == [{"a": 1}]


def test_the_machine_is_named():
    assert machine.describe("cpu")["card"] == "none (cpu)"


def test_all_files_with_tests_for_cuda_are_run():
    files = command.test_files()
    assert all((command.ROOT / file).is_file() for file in files)
    folder = {
        str(p.relative_to(command.ROOT)) for p in Path("tests/cuda").resolve().glob("test_*.py")
    }
    assert folder <= set(files)
    assert "tests/train/test_augment.py" in files
