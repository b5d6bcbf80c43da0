"""The command `syncnorm diagnose` on a run, and its page."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from syncnorm.train.config.file import load_config
from syncnorm.train.report.diagnosis import render
from tests.launch import commands
from tests.launch.commands import call
from tests.launch.test_report_browser import CHROMIUM, browse
from tests.launch.test_use import make
from tests.train.report_page import Page

OVERRIDES = ["train.epochs=1", "train.dtype=float64"]


@pytest.fixture(scope="module")
def made(pool, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("diagnose") / "digits"
    return make(pool, folder, load_config("digits", OVERRIDES)).folder


@pytest.fixture
def run(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "digits"))


def test_a_page_and_numbers_beside_an_unchanged_run(run, capfd):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    status, out, err = call(capfd, "diagnose", run, "--batches", 1)
    assert status == 0
    assert out.splitlines() == ["- nothing stands out", str(run / "diagnosis.html")]
    assert err.startswith("about ")
    assert "the loss around the weights" in err
    added = {run / "diagnosis.html", run / "diagnosis.json"}
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after.keys() - before.keys() == added
    assert {path: after[path] for path in before} == before
    found = json.loads((run / "diagnosis.json").read_text())
    assert found["run"] == "digits"
    assert found["batches"] == 1
    page = Page((run / "diagnosis.html").read_text())
    assert sum(tag == "svg" for tag, _ in page.elements) == 11
    assert not [each for each in page.elements if {"src", "onload"} & each[1].keys()]
    assert "layer1.0.conv1" in page.text


def test_workers_of_its_own_find_the_same(run):
    only = ["diagnose", str(run), "--only", "statistics, gradients", "--batches", "2"]
    numbers = []
    for options in ([], ["--workers", "2"]):
        done = commands.run([*commands.SYNCNORM, *only, *options], run.parent)
        assert done.returncode == 0, done.stderr
        numbers.append(json.loads((run / "diagnosis.json").read_text()))
    for found in numbers:
        assert list(found["measures"]) == ["statistics", "gradients"]
    first, second = (found["measures"]["gradients"] for found in numbers)
    assert first["norm"] == pytest.approx(second["norm"], rel=1e-9)
    assert first["layers"]["fc"] == pytest.approx(second["layers"]["fc"], rel=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["RUN", "--only", "statistics,colour"], "`--only` must be some of statistics, grad"),
        (["RUN", "--device", "tpu"], "`--device` must be auto, cpu or cuda, got 'tpu'"),
        (["RUN", "--checkpoint", "step-7"], "`--checkpoint` must be newest, best, recalibrated"),
        (["NO/RUN"], "has no config.yaml"),
    ],
)
def test_bad_input_is_one_line(run, capfd, options, message):
    status, out, err = call(
        capfd, "diagnose", *(run if each == "RUN" else each for each in options)
    )
    assert status == 2
    assert out == ""
    assert message in err.splitlines()[-1]
    assert not (run / "diagnosis.json").exists()


def _found(**changes: Any) -> dict[str, Any]:
    layer = {
        "between_share": 0.4, "chance_share": 0.1, "part_gaps": [0.1, 0.2], "mean_gap": None,
        "var_gap": None, "flat_share": 0.0, "values": 12.0, "noise_ratio": None, "momentum": 0.1,
        "is_frozen": False, "is_pooled": False, "pools_running": False, "recalibrates": True,
    }  # fmt: skip
    statistics = {
        "loss": {"training": 1.0, "evaluation": None, "population": 2.0},
        "parts": 2, "samples": 8, "layers": {"<b>norm</b>": layer},
    }  # fmt: skip
    return {
        "run": "<script>x</script>", "step": 1200, "workers": 2, "batches": 1, "samples": 8,
        "lr": 0.1, "measures": {"statistics": statistics, "shift": {}},
        "advice": [{"rule": "between workers", "text": "40 % of <b>norm</b>'s variance"}],
        "seconds": {}, **changes,
    }  # fmt: skip


def test_a_run_that_cannot_be_written_to_is_refused_at_once(run, capfd):
    # For root, permissions do not say no.
    with mock.patch.object(os, "access", return_value=False):
        status, _, err = call(capfd, "diagnose", run)
    assert status == 2
    assert "must be writable, for diagnosis.json" in err.splitlines()[-1]


def test_the_page_shows_advice_and_escapes_names():
    text = render(_found())
    page = Page(text)
    assert "<script>" not in text
    assert "<b>" not in text
    assert "<script>x</script>" in page.texts
    assert "40 % of <b>norm</b>'s variance" in page.texts
    assert "Step 1,200, 1 batch of 8 samples, in the parts of 2 workers." in page.texts
    assert render(_found(advice=[])).count("Nothing.") == 1


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_screen(tmp_path, width):
    page = tmp_path / "diagnosis.html"
    probe = "<script>document.title = document.documentElement.scrollWidth</script></body>"
    text = render(_found()).replace("</body>", probe)
    page.write_text(text.replace("default-src 'none'", "script-src 'unsafe-inline'"))
    dom, _ = browse(page, "--dump-dom", f"--window-size={width},2000")
    measured = int(dom.partition("<title>")[2].partition("</title>")[0])
    # The narrowest window of headless chromium is about 500 wide.
    assert measured <= max(width, 500)
