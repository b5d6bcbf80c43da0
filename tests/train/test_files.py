"""Files that are whole or absent, and metrics."""

import json

import pytest

from syncnorm.train.files import write_text_whole, write_whole
from syncnorm.train.metrics import MetricsFile, last_step


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a"
    write_text_whole(path, "old")
    write_text_whole(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    write_text_whole(path, "old")

    def half(file):
        file.write(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_metrics_are_json_lines_also_when_a_loss_is_not_finite(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.write("step", step=1, loss=0.5)
    metrics.write("step", step=2, loss=float("nan"))
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == {"event": "step", "step": 1, "loss": 0.5}
    assert second["loss"] == "nan"
    assert last_step(path) == 2


def test_nothing_on_record(tmp_path):
    assert last_step(tmp_path / "metrics.jsonl") == 0


def test_a_worker_that_does_not_write():
    MetricsFile(None).write("step", step=1)
