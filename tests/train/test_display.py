"""The screen of a run in terminals of any width."""

import re

import pytest

from syncnorm.train.display import Display

BAR = "[━╸╺]+"


def last_line(width: int, total: int, monkeypatch, capsys, **options: bool) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with Display(total, quiet=False, **options) as display:
        display.advance(total // 2, 0.02114)
        display.show_speed(2848.2, 0.071)
        display._progress.refresh()
        shown = capsys.readouterr().err
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    return re.split(r"[\r\n]+", text)[-1]


@pytest.mark.parametrize(
    ("width", "total", "figures"),
    [
        (160, 276, "loss 0.0211  2848 samples/s  7 % exchanging "),
        (80, 276, "loss 0.0211  2848 samples/s "),
        (80, 1_000_000, "loss 0.0211  2848 samples/s "),
        (60, 276, "loss 0.0211 "),
        (50, 276, " "),
    ],
)
def test_bar_count_and_time_left_are_always_there(width, total, figures, monkeypatch, capsys):
    line = last_line(width, total, monkeypatch, capsys)
    expected = (
        rf"training {BAR} +{total // 2}/{total} steps {re.escape(figures)}(\d+:\d\d|-:--|--:--)+ *"
    )
    assert re.fullmatch(expected, line), line
    assert len(line) <= width


def test_one_worker_exchanges_with_nobody(monkeypatch, capsys):
    line = last_line(160, 276, monkeypatch, capsys, is_pooled=False)
    assert "samples/s" in line
    assert "exchanging" not in line
