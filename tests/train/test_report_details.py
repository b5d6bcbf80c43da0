"""Names, values under the pointer, hidden runs, cut axes, predictions, and pages that follow a run."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
from matplotlib.image import imread

from syncnorm.train.report import watch_report, write_own_report, write_report
from tests.train import runs
from tests.train.report_page import Page, report
from tests.train.report_runs import changed, epoch, interval, start, step, write_run
from tests.train.test_loop import FEW, run


def titles(path: Path) -> list[str]:
    """What is shown under the pointer."""
    return re.findall(r"<title>(step [^<]*)</title>", path.read_text())


def test_runs_have_the_names_that_they_were_given(tmp_path):
    folders = []
    for folder, name in {
        "a": "fast",
        "b": "slow",
        "c": "fast",
        "d": None,
        "e": 3,
        "f": " ",
    }.items():
        config = changed() | {"name": name}
        folders.append(write_run(tmp_path / folder, [step(1)], config=config))
    rows = report(tmp_path, *folders).summary
    assert [row["Run"] for row in rows] == ["fast (a)", "slow", "fast (c)", "d", "e", "f"]


def test_values_are_shown_under_the_pointer(tmp_path):
    first = write_run(tmp_path / "a", [start(), step(1, 0.5), step(2, 0.25), epoch(2, 0.75)])
    second = write_run(tmp_path / "b", [start(), step(2, "nan"), step(4, 0.125)])
    write_report([first, second], tmp_path / "report.html")
    shown = titles(tmp_path / "report.html")
    assert shown[:3] == ["step 1\na: 0.5", "step 2\na: 0.25", "step 4\nb: 0.125"]
    assert "step 2\na: 75.00 %" in shown


def test_a_long_curve_has_a_bounded_number_of_places_to_point_at(tmp_path):
    folder = write_run(tmp_path / "a", [step(number, 1.0) for number in range(1, 5000)])
    report(tmp_path, folder)
    losses = [title for title in titles(tmp_path / "report.html") if title.endswith("a: 1")]
    assert len(losses) == 60
    assert losses[-1] == "step 4,999\na: 1"


@pytest.mark.parametrize(("worst", "is_cut"), [(1e12, True), (-1e12, True), (2.0, False)])
def test_a_diverged_run_does_not_ruin_the_axis(tmp_path, worst, is_cut):
    good = [step(number, 1.0 + 1 / number) for number in range(1, 40)]
    bad = [*good[:20], *(step(number, worst) for number in range(20, 40))]
    page = report(tmp_path, write_run(tmp_path / "good", good), write_run(tmp_path / "bad", bad))
    cut = [text for text in page.texts if "cut, as far as" in text]
    assert cut == ([f"{'▲' if worst > 0 else '▼'} cut, as far as {worst:.3g}"] if is_cut else [])
    labels = [text for tag, text in page.tagged if tag == "text" and "cut" not in text]
    assert max(map(len, labels)) < 16
    assert not any("1e" in label or "00000" in label for label in labels)


def test_a_run_alone_keeps_its_first_steps_and_its_warmup(tmp_path):
    events = [
        {**step(number, 2.3 * 0.97**number), "lr": min(number / 5, 1) * 0.1}
        for number in range(1, 300)
    ]
    page = report(tmp_path, write_run(tmp_path / "a", events))
    assert "cut" not in page.text


def test_runs_can_be_hidden(tmp_path):
    folders = [
        write_run(tmp_path / name, [step(1), step(2), interval(2, 100.0, 0.1)]) for name in "ab"
    ]
    page = report(tmp_path, *folders)
    boxes = [each for tag, each in page.elements if tag == "input"]
    assert [box["id"] for box in boxes] == ["show-0", "show-1"]
    text = (tmp_path / "report.html").read_text()
    for index in (0, 1):
        rule = f"body:has(#show-{index}:not(:checked)) .run-{index} {{ display: none }}"
        assert rule in text
        assert page.values("class").count(f"run-{index}") >= 4
    report(tmp_path, folders[0])
    assert "checkbox" not in (tmp_path / "report.html").read_text()


PIXEL = "data:image/png;base64,iVBORw0KGgo="
PREDICTIONS = {
    "event": "predictions",
    "step": 2,
    "split": "test",
    "count": 10,
    "confusion": [[4, 1], [0, 5]],
    "samples": [
        {"class": 0, "predicted": 1, "share": 0.75, "image": PIXEL},
        {"class": 1, "predicted": 1, "share": 0.5},
    ],
}


def test_predictions_are_shown(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "a", [step(1), PREDICTIONS]))
    assert "Of 10 samples of the test set." in page.text
    assert "class 0 taken for 1: 20.00 % of the class" in page.values("title")
    assert page.values("src") == [PIXEL]
    assert [text for tag, text in page.tagged if tag == "small"][-2:] == ["75.00 %", "50.00 %"]


def test_of_many_classes_the_mistakes_are_listed(tmp_path):
    event = {**PREDICTIONS, "confused": [[700, 3, 1234]]}
    del event["confusion"]
    page = report(tmp_path, write_run(tmp_path / "a", [step(1), event]))
    assert {"Class": "700", "Taken for": "3", "Samples": "1,234"} in page.rows


@pytest.mark.parametrize(
    "change",
    [
        {"confusion": [[1, 2], [3]]},
        {"confusion": [[1, -2], [3, 4]]},
        {"confusion": [["<b>"]]},
        {"confusion": 3},
        {"confusion": [[1] * 40] * 40},
        {"samples": [{"class": 0, "predicted": 1, "share": 2, "image": "https://a.b/c.png"}]},
        {"samples": [{"class": "a", "predicted": 1}, 3, None]},
        {"samples": {}},
        {"split": "train"},
        {"count": True},
    ],
)
def test_predictions_of_the_wrong_kind_are_left_out(tmp_path, change):
    page = report(tmp_path, write_run(tmp_path / "a", [step(1), PREDICTIONS | change]))
    text = (tmp_path / "report.html").read_text()
    assert "://" not in text
    assert (PIXEL in text) == ("confusion" in change)
    assert ("class 0 taken for 1" in " ".join(page.values("title"))) == ("samples" in change)


def test_a_classifier_leaves_its_predictions(pool, tmp_path):
    options = [FEW, "train.epochs=1", "train.global_batch=79", "follow.every=2"]
    found = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        outcome, _ = run(pool, workers, folder, options)
        (event,) = runs.events(folder, "predictions")
        matrix = event["confusion"]
        assert sum(map(sum, matrix)) == event["count"] == 80
        right = sum(matrix[index][index] for index in range(10))
        assert right / 80 == outcome.metrics["test"]["accuracy"]
        found.append(matrix)
        sample = event["samples"][0]
        assert sample["class"] != sample["predicted"]
        assert matrix[sample["class"]][sample["predicted"]] > 0
        image = base64.b64decode(sample["image"].partition(",")[2])
        assert imread(io.BytesIO(image)).shape == (8, 8)
        assert len(json.dumps(event)) < 8000
        assert all(e["memory"] > 2**20 for e in runs.events(folder, "interval"))
    assert found[0] == found[1]
    run(pool, 1, tmp_path / "1", options)
    assert len(runs.events(tmp_path / "1", "predictions")) == 1, "nothing was trained since"


def test_a_watched_page_reloads_itself_until_the_run_has_ended(tmp_path):
    folder = write_run(tmp_path / "a", [step(1)], status=None)
    output, seen = tmp_path / "report.html", []

    def wait(seconds: float) -> None:
        seen.append((seconds, [e for t, e in Page(output.read_text()).elements if t == "meta"]))
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(step(2)) + "\n")
        if len(seen) == 2:
            (folder / "exit.json").write_text('{"status": "done"}')

    assert watch_report([folder], output, wait) == output
    refresh = {"http-equiv": "refresh", "content": "10"}
    assert [(seconds, refresh in metas) for seconds, metas in seen] == [(10, True), (10, True)]
    last = Page(output.read_text())
    assert refresh not in [attributes for tag, attributes in last.elements if tag == "meta"]
    assert last.summary[0]["Steps"] == "2"


def test_a_watch_that_is_interrupted_leaves_a_whole_page(tmp_path):
    folder = write_run(tmp_path / "a", [step(1)], status=None)

    def wait(seconds: float) -> None:
        raise KeyboardInterrupt

    output = watch_report([folder], tmp_path / "report.html", wait)
    assert 'http-equiv="refresh"' not in output.read_text()


def test_a_runs_own_page_never_fails_it(tmp_path):
    folder = write_run(tmp_path / "a", [step(1)])
    write_own_report(folder)
    assert Page((folder / "report.html").read_text()).summary[0]["Run"] == "a"
    write_own_report(tmp_path / "missing")


@pytest.mark.parametrize(
    ("decides", "column", "best"),
    [
        ("-NLL@val", "Best validation NLL@val", "0.2step 2"),
        ("précision", "Best validation précision", "0.4step 1"),
        ("", "Best metric", "–"),
        ("left out", "Best metric", "–"),
    ],
)
def test_the_best_is_of_what_decides(tmp_path, decides, column, best):
    start = {"event": "start", "step": 0, "time": 1.0, "world_size": 1, "decides": decides}
    values = [(0.9, 0.4, 0.3), (0.5, 0.2, 0.1)]
    evaluated = [
        {"event": "evaluation", "step": n, "validation_loss": loss, "validation_précision": p}
        | {"validation_NLL@val": q + 0.1}
        for n, (loss, p, q) in enumerate(values, start=1)
    ]
    page = report(tmp_path, write_run(tmp_path / "a", [start, step(1), *evaluated, step(2)]))
    found = {name: text for name, text in page.summary[0].items() if name.startswith("Best")}
    assert found == {column: best}
    assert page.figure("Validation NLL@val")


def test_metrics_of_the_end_alone_are_a_note(tmp_path):
    events = [{"event": "epoch", "step": number, "validation_accuracy": 0.5} for number in (1, 2)]
    end = {"event": "end", "step": 2, "test_accuracy": 0.25, "test_loss": 3.0}
    page = report(tmp_path, write_run(tmp_path / "a", [step(1), *events, end]))
    assert "at its end: test accuracy 25.00 %, test loss 3" in page.text
    assert not any(label.startswith("Test accuracy") for label in page.values("aria-label"))
    assert page.figure("Validation accuracy")
