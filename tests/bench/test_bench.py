"""`syncnorm bench`: figures of a tiny case, layers of others, bad input, and the statistics of a round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from syncnorm.bench import paired
from tests.launch.commands import SYNCNORM, started

ROOT = Path(__file__).parents[2]
CASE = ["--case", "8x64x8x8", "--rounds", "2", "--seconds", "300"]


def _bench(*arguments: str) -> tuple[int, str, str]:
    with started([*SYNCNORM, "bench", *arguments], ROOT) as process:
        out, err = process.communicate(timeout=600)
        return process.returncode, out, err


def test_a_tiny_case_with_a_layer_of_others(tmp_path):
    status, out, err = _bench(
        *CASE, "--layer", "tests.bench.layers:Twice", "--json", str(tmp_path / "b")
    )
    assert status == 0, err
    found = json.loads((tmp_path / "b").read_text())
    assert (found["version"], found["workers"], found["cut"]) == (1, 2, [])
    contiguous, channels_last = found["cases"]
    assert [case["shape"] for case in found["cases"]] == [[8, 64, 8, 8]] * 2
    assert channels_last["layout"] == "channels last"
    rows = {row["layer"]: row for row in contiguous["results"]}
    assert rows["local"]["to_local"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    # [2C + 1] and [2C], each padded to 2C + 2 numbers of 8 bytes.
    assert (rows["sync=batch"]["messages"], rows["sync=batch"]["message_bytes"]) == (2, 2 * 8 * 130)
    assert rows["sync=none"]["messages"] == rows["local"]["messages"] == 0
    (theirs,) = (row for name, row in rows.items() if "Twice" in name)
    assert (theirs["messages"], theirs["message_bytes"]) == (1, 4 * 64)
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in rows.values())
    assert "sync=batch" in out


def test_a_layer_that_raises_on_one_worker_hangs_nobody():
    status, out, err = _bench(*CASE, "--layer", "tests.bench.layers:RaisesOnOne")
    assert status == 1
    assert "rank 0 has had enough" in out + err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layer", "nothing:Here"], "No module named 'nothing'"),
        (["--layer", "json:dumps"], "--layer"),
        (["--device", "cuda"], "--device"),
        (["--case", "no such case"], "--case"),
    ],
)
def test_bad_input_is_one_line(arguments, words):
    status, _, err = _bench(*arguments)
    assert status == 2
    assert words in err
    assert "Traceback" not in err


def test_ratio_is_the_median_of_the_rounds_ratios():
    found = paired.ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0])
    assert (found.median, found.low, found.high) == (3.0, 2.0, 4.0)
