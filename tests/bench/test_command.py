"""The command `syncnorm bench`: real runs on two workers, and what it refuses."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from syncnorm.bench import runner
from syncnorm.bench.cases import cases
from syncnorm.bench.report import CaseResult, Cut, Ratio, Report, Result
from tests.launch.commands import call

ROOT = Path(__file__).parents[2]
OURS = "tests.bench.layers"


def test_figures_of_layers_on_two_workers(capfd, tmp_path):
    json, plot = tmp_path / "all.json", tmp_path / "all.svg"
    files = ["--output", str(json), "--plot", str(plot)]
    layers = ["--layer", f"{OURS}:Twice", "--layer", f"{OURS}:RaisesOnOne"]
    status, out, err = call(
        capfd, "bench", "--case", "8x64x8x8", "--rounds", "2", "--seconds", "600", *files, *layers
    )
    # One error, and the other layers have their figures.
    assert status == 1
    error = "rank 0: ValueError: rank 0 has had enough (layer 8x64x8x8)"
    assert err.splitlines()[-1] == f"syncnorm: {OURS}:RaisesOnOne failed: {error}"
    report = Report.model_validate_json(json.read_text())
    assert report.errors() == {f"{OURS}:RaisesOnOne": error}
    assert (report.workers, report.backend, report.device, report.cut) == (2, "gloo", "cpu", [])
    assert [case.case for case in report.cases] == [
        "layer 8x64x8x8",
        "layer 8x64x8x8 channels last",
    ]
    for case in report.cases:
        assert case.rounds == 2
        results = {result.layer: result for result in case.results if result.error is None}
        for name, result in results.items():
            assert result.to_local is not None
            assert result.seconds is not None
            assert result.to_local.low <= result.to_local.median <= result.to_local.high
            assert result.peak_bytes is not None
            assert result.peak_bytes >= 2 * 8 * 64 * 8 * 8 * 4, name  # y and the gradient of x
        messages = {name: (r.messages, r.message_bytes) for name, r in results.items()}
        # A message of ours is of 2C+2 numbers of float64.
        assert messages == {
            "local": (0, 0),
            "naive": (2, 2 * 2 * 64 * 4),
            "sync=none": (0, 0),
            "sync=running": (1, (2 * 64 + 4) * 8),
            "sync=lagged": (2, messages["sync=lagged"][1]),
            "sync=batch": (2, 2 * (2 * 64 + 2) * 8),
            "renorm, sync=running": (1, (2 * 64 + 4) * 8),
            "renorm, sync=batch": (2, 2 * (2 * 64 + 2) * 8),
            f"{OURS}:Twice": (1, 64 * 4),
        }
    assert re.search(r"^local +1\.00 \[1\.00, 1\.00\] ", out, flags=re.MULTILINE)
    assert "<svg" in plot.read_text()
    assert out.splitlines()[-2:] == [str(json), str(plot)]


@pytest.mark.slow
def test_figures_of_compiled_layers_and_of_a_model(capfd, tmp_path):
    json = tmp_path / "all.json"
    which = ["--case", "8x64x8x8", "--case", "resnet18", "--batch", "2"]
    options = ["--rounds", "1", "--seconds", "1800", "--output", str(json)]
    status, _, err = call(capfd, "bench", *which, *options)
    assert status == 0, err
    (model,) = [c for c in Report.model_validate_json(json.read_text()).cases if c.kind == "model"]
    messages = {result.layer: result.messages for result in model.results}
    assert messages["sync=batch"] == 40
    status, _, err = call(capfd, "bench", "--case", "8x64x8x8", "--compile", *options)
    assert status == 0, err
    for case in Report.model_validate_json(json.read_text()).cases:
        assert sum(result.compiled for result in case.results) == 5


def test_what_there_is_no_time_for_is_told(monkeypatch):
    told = Report(machine="", device="cpu", backend="gloo", workers=2, cores=1)
    monkeypatch.setattr(runner, "RankPool", None)  # nothing may be started
    runner.Runner(told, 3).run(cases(2, "cpu"), [], 0.0)
    assert told.cut
    assert {cut.reason for cut in told.cut} == {"the 0 seconds were over"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "torch.nn:Missing"], "`--layer` must name what can be imported"),
        (["--layer", "torch:zeros"], "`--layer` must name a class of torch.nn.Module"),
        (["--device", "tpu"], "`--device` must be cpu or cuda, got 'tpu'."),
        (["--device", "cuda"], "`--device` must be cpu where there is no CUDA device, got 'cuda'."),
        (["--case", "resnet19"], "`--case` must be part of the name of a case, got 'resnet19'."),
        (["--plot", "plot.bmp"], "`--plot` must end with .pdf, .png, .svg, got 'plot.bmp'."),
        (["--output", "missing/a.json"], "`--output` must be a file in a folder that exists"),
        (["--workers", "0"], "--workers"),
    ],
    ids=str,
)
def test_bad_arguments_are_status_2_and_start_nothing(capfd, monkeypatch, arguments, message):
    monkeypatch.setattr(runner, "RankPool", None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    status, out, err = call(capfd, "bench", *arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_a_plot_without_matplotlib_says_how_to_install_it(capfd, monkeypatch):
    monkeypatch.setattr(runner, "RankPool", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = call(capfd, "bench", "--plot", "plot.svg")
    assert status == 2
    assert "pip install 'syncnorm[report]'" in err


def test_compiling_without_a_compiler_is_refused(capfd, monkeypatch):
    monkeypatch.setattr(runner, "RankPool", None)

    def broken(function):
        raise RuntimeError("no compiler found")

    monkeypatch.setattr("torch.compile", broken)
    status, _, err = call(capfd, "bench", "--compile")
    assert status == 2
    assert "`--compile` needs what torch.compile works with, got RuntimeError: no compiler" in err


def test_the_page_explains_every_field_of_the_json():
    page = (ROOT / "docs" / "bench.md").read_text()
    fields = {
        name for part in (Report, CaseResult, Result, Ratio, Cut) for name in part.model_fields
    }
    assert [name for name in sorted(fields) if f"`{name}`" not in page] == []
