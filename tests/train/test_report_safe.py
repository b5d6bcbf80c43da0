"""What a report can never do: run what stands in a run's folder, load anything, or differ from time
to time.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import pytest

from syncnorm.train.report import write_report
from tests.train.report_page import Page, report
from tests.train.report_runs import BEGIN, changed, start, step, write_examples, write_run

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """The page of three runs, and their folders."""
    folder = tmp_path_factory.mktemp("report")
    runs = write_examples(folder)
    return write_report(runs, folder / "report.html"), runs


EVIL = "{{ 7 * 7 }}{% raw %}<script>alert('a')</script><img src=x onerror=alert(1)>\"'&amp;</svg></style>"


@pytest.mark.parametrize("number", ["inf", "nan", "-inf", 1e300, True, []])
def test_times_that_are_none_do_no_harm(tmp_path, number):
    events = [
        {**start(), "time": number},
        {"event": "epoch", "step": 1, "time": number, "seconds": number, "test_accuracy": 0.5},
        {"event": "fault", "time": number, "step": 1, "kind": "not_finite", "message": ""},
    ]
    page = report(tmp_path, write_run(tmp_path / "run", events))
    assert page.summary[0]["Best test accuracy"] == "50.00 %step 1"


def test_text_from_a_run_stays_text(tmp_path):
    name = EVIL.replace("/", "")
    config = changed(model__name=EVIL)
    layers = {
        "event": "layers",
        "step": 1,
        "layers": {EVIL: {"mean_gap": 1.0}, "$\\frac{$": {"mean_gap": 2.0}},
    }
    events = [
        {**start(), "device": EVIL, "versions": {EVIL: EVIL}, "placement": EVIL},
        step(1),
        layers,
        {"event": "checkpoint", "time": BEGIN, "step": 1, "path": EVIL},
        {"event": "fault", "time": BEGIN, "step": 1, "kind": EVIL, "message": EVIL},
        start(5, 1, resumed_from=EVIL),
    ]
    evil = write_run(tmp_path / name, events, config=config, status=EVIL, reason=EVIL)
    plain = write_run(tmp_path / "plain", [])
    for runs in ([evil], [evil, plain]):
        page = report(tmp_path, *runs)
        assert {tag for tag, _ in page.elements} & {"script", "img"} == set()
        assert page.summary[0]["Run"] == name
        assert page.summary[0]["Status"] == EVIL
        assert any(row.get("Message") == EVIL for row in page.rows)
        assert EVIL in page.texts or len(runs) == 1
        assert_nothing_is_loaded(page)
        assert "…" + EVIL[-21:] in page.texts  # a layer in a figure


@pytest.mark.parametrize(
    "text", ["\x00\x1b[31m", "\ud800", "\u202e\u2028", "日本語", "x" * 100_000, "\n\n", ""]
)
def test_any_text_makes_a_page(tmp_path, text):
    layers = {"event": "layers", "step": 1, "layers": {text: {"mean_gap": 1.0}}}
    fault = {"event": "fault", "step": 1, "kind": text, "message": text}
    run = write_run(tmp_path / "a", [step(1), layers, fault], reason=text, status=text)
    assert report(tmp_path, run).figure("Gap of the mean")
    assert (tmp_path / "report.html").stat().st_size < 500_000


def assert_nothing_is_loaded(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in (
                "src",
                "href",
                "xlink:href",
                "action",
                "srcset",
                "poster",
                "data",
                "background",
            ):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value)
            if name in ("style", "clip-path", "fill", "stroke", "mask", "filter"):
                assert re.sub(r"url\(#[\w-]+\)", "", value).find("url(") == -1, (tag, name, value)


def test_nothing_is_loaded_from_elsewhere(examples):
    text = examples[0].read_text(encoding="utf-8")
    page = Page(text)
    assert_nothing_is_loaded(page)
    assert "://" not in text
    assert "@import" not in text
    head = [attributes for tag, attributes in page.elements if tag == "meta"]
    assert {"http-equiv": "Content-Security-Policy", "content": POLICY} in head
    assert any(value.startswith("data:image/png") for value in page.values("href"))


def test_the_check_on_loading_can_fail():
    for bad in (
        '<img src="https://a.b/c.png">',
        '<p style="background: url(//a.b)"></p>',
        '<p onclick="x"></p>',
        "<script></script>",
    ):
        with pytest.raises(AssertionError):
            assert_nothing_is_loaded(Page(bad))


def test_names_within_the_page_are_unique_and_found(examples):
    page = Page(examples[0].read_text(encoding="utf-8"))
    names = page.values("id")
    assert len(names) == len(set(names)) > 20
    inside = [value[1:] for value in page.values("href") if value.startswith("#")]
    clips = [name for value in page.values("clip-path") for name in re.findall(r"#([\w-]+)", value)]
    assert inside
    assert clips
    assert {*inside, *clips, *page.values("aria-labelledby")} <= set(names)


def test_figures_follow_the_page_from_light_to_dark(examples):
    page = Page(examples[0].read_text(encoding="utf-8"))
    styles = "\n".join(page.values("style"))
    assert {"--muted", "--grid", "--run-0", "--run-1", "--run-2"} <= set(
        re.findall(r"var\(([\w-]+)\)", styles)
    )
    assert "#000" not in styles
    assert "font-family" not in styles


def test_figures_speak_and_swatches_are_silent(examples):
    page = Page(examples[0].read_text(encoding="utf-8"))
    for tag, attributes in page.elements:
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
            assert "viewbox" in attributes
            assert "width" not in attributes
    assert page.figure("Test accuracy").startswith(
        "Test accuracy over optimizer steps: digits-20251009-101500 from 0.3"
    )


def test_the_same_folders_give_the_same_bytes(examples, tmp_path):
    page, runs = examples
    first = page.read_bytes()
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.hashsalt": None}):
        assert write_report(runs, tmp_path / "b.html").read_bytes() == first
    code = (
        "import sys; from pathlib import Path; from syncnorm.train.report import write_report\n"
        "output, *runs = map(Path, sys.argv[1:]); write_report(runs, output)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "c.html", runs[0]],
        check=True,
        timeout=900,
        env=environment,
    )
    of_one = write_report(runs[:1], tmp_path / "d.html").read_bytes()
    assert (tmp_path / "c.html").read_bytes() == of_one != first
