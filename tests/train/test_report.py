"""What the page of `syncnorm report` says about runs, and which folders it refuses."""

import statistics
import subprocess
import sys

import numpy as np
import pytest

from syncnorm.errors import ConfigError
from syncnorm.train.report import write_report
from syncnorm.train.report.events import Mark, read_events
from syncnorm.train.report.run import read_runs
from syncnorm.train.report.summary import config_differences
from tests.train.report_page import report
from tests.train.report_runs import (
    BEGIN,
    CONFIG,
    Example,
    changed,
    epoch,
    interval,
    start,
    step,
    write_run,
)


def test_the_summary_says_what_the_events_say(tmp_path):
    run = write_run(
        tmp_path / "a",
        [
            start(),
            *(step(number) for number in range(1, 5)),
            *(
                interval(number, speed, share)
                for number, speed, share in [(1, 700, 0.1), (2, 1300, 0.3), (3, 900, 0.25)]
            ),
            epoch(2, 0.75),
            {
                "event": "fault",
                "time": BEGIN + 3,
                "step": 3,
                "kind": "not_finite",
                "message": "so it is",
            },
            epoch(4, 0.5),
            {"event": "end", "time": BEGIN + 95.0, "step": 4, "test_accuracy": 0.625},
        ],
    )
    assert report(tmp_path, run).summary == [
        {
            "Run": "a",
            "Status": "done",
            "Steps": "4",
            "Workers": "2",
            "Best test accuracy": "75.00 %step 2",
            "Last test accuracy": "62.50 %",
            "Samples/s": "900",
            "In exchanges": "25.00 %",
            "Faults": "11 not finite",
            "Restarts": "0",
            "Duration": "1 min 35 s",
        }
    ]


def test_the_summary_of_a_whole_example(tmp_path):
    example = Example(seed=5, epochs=3)
    events = [example.start(), *example.course(0, example.total), example.end()]
    row = report(tmp_path, write_run(tmp_path / "a", events)).summary[0]
    by_step = {
        event["step"]: event["test_accuracy"] for event in events if "test_accuracy" in event
    }
    speeds = [event["samples_per_second"] for event in events if event["event"] == "interval"]
    best = max(by_step.values())
    assert row["Steps"] == "69"
    assert (
        row["Best test accuracy"]
        == f"{100 * best:.2f} %step {min(s for s in by_step if by_step[s] == best)}"
    )
    assert row["Last test accuracy"] == f"{100 * example.best:.2f} %"
    assert row["Samples/s"] == f"{statistics.median(speeds):,.0f}"
    assert row["Duration"] == f"{events[-1]['time'] - events[0]['time']:.1f} s"


def test_of_several_records_of_a_step_the_last_holds(tmp_path):
    run = write_run(
        tmp_path / "a",
        [
            start(0),
            *(step(number, 8.0) for number in range(1, 7)),
            epoch(4, 0.9),
            start(1000, 3, workers=1, resumed_from="step-00000003"),
            *(step(number, 4.0) for number in range(4, 6)),
            epoch(4, 0.3),
            {"event": "end", "time": BEGIN + 1010, "step": 5, "test_accuracy": 0.3},
        ],
    )
    events = read_events(run / "metrics.jsonl")
    assert events.curve("loss") == {1: 8.0, 2: 8.0, 3: 8.0, 4: 4.0, 5: 4.0, 6: 8.0}
    assert events.marks == [Mark("restart", 3, 1000.0, "step-00000003", "on 1 worker")]
    page = report(tmp_path, run)
    row = page.summary[0]
    assert (row["Best test accuracy"], row["Steps"], row["Restarts"]) == ("30.00 %step 4", "5", "1")
    assert row["Workers"] == "2 → 1"
    assert row["Duration"] == "14.0 s"  # 4 s, then 10 s; not the time between them
    assert page.marks == [("3", "▸ restart")]


def test_a_first_start_is_a_restart_only_after_step_0(tmp_path):
    assert report(tmp_path, write_run(tmp_path / "a", [start()])).summary[0]["Restarts"] == "0"
    assert (
        report(tmp_path, write_run(tmp_path / "b", [start(number=7)])).summary[0]["Restarts"] == "1"
    )


@pytest.mark.parametrize(
    ("tail", "count"),
    [
        ("", 0),
        ("\n\n", 0),
        ('{"event": "step", "step": 3, "lo', 1),
        ('[1]\n"step"\n{"event": "step", "step": 3, "lo', 3),
        ("[" * 100_000, 1),
        ("1" * 5_000, 1),
    ],
)
def test_torn_lines_are_counted_and_left_out(tmp_path, tail, count):
    page = report(tmp_path, write_run(tmp_path / "a", [step(1), step(2)], tail=tail))
    assert page.summary[0]["Steps"] == "2"
    plural = "" if count == 1 else "s"
    assert (f"{count} line{plural} of metrics.jsonl could not be read" in page.text) == (count > 0)


def test_bytes_that_are_no_text(tmp_path):
    run = write_run(tmp_path / "a", [step(1)])
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"event": "step", "step": 2, "loss": "\xff"}\n')
    assert read_events(run / "metrics.jsonl").torn == 1


def test_values_of_the_wrong_kind_are_as_good_as_missing(tmp_path):
    odd = [
        {"event": "step", "step": "4", "loss": 1.0},
        {"event": "step", "step": True, "loss": 1.0},
        {"event": "step", "step": -1, "loss": 1.0},
        {"event": "step", "step": 2, "loss": None, "lr": [1]},
        {"event": "step", "step": 3, "loss": 10**400},
        {"event": "layers", "step": 3, "layers": {"a": 1, "b": {"mean_gap": "wide"}}},
        {"event": "layers", "step": 3, "layers": 7},
        {"event": "fault", "step": 3},
        {"event": ["step"], "step": 9},
        {"step": 9},
        {"event": "tomorrow's", "step": 9},
    ]
    page = report(tmp_path, write_run(tmp_path / "a", [step(1), *odd]))
    assert page.summary[0]["Steps"] == "3"
    assert page.marks == [("3", "× fault: unknown")]
    assert read_events(tmp_path / "a" / "metrics.jsonl").curve("loss") == {1: 1.0}


def test_a_run_without_any_event(tmp_path):
    run = write_run(tmp_path / "a", [], status=None)
    for _ in range(2):
        page = report(tmp_path, run)
        row = page.summary[0]
        assert (row["Status"], row["Steps"], row["Last metric"], row["Duration"]) == (
            "unfinished",
            "0",
            "–",
            "–",
        )
        assert "No step is on record yet." in page.text
        (run / "metrics.jsonl").unlink(missing_ok=True)  # the second time without the file


def test_losses_that_are_not_finite(tmp_path):
    losses = [2.0, "nan", 1.0, "inf", "-inf", 0.5]
    run = write_run(tmp_path / "a", [step(number, loss) for number, loss in enumerate(losses, 1)])
    page = report(tmp_path, run)
    assert "loss not finite at 3 steps, first at step 2" in page.text
    assert (
        page.figure("Training loss")
        == "Training loss over optimizer steps: a from 2 to 0.5 at step 6."
    )
    whole = report(tmp_path, write_run(tmp_path / "b", [step(1)]))
    assert "not finite" not in whole.text


@pytest.mark.parametrize(
    "losses",
    [[0.0], [1.0], [3.0] * 5, [-1.0, 2.0], [1e300, 1e-300], [1e308] * 200, [5e-324, 1e308]],
)
def test_losses_at_the_edges(tmp_path, losses):
    run = write_run(tmp_path / "a", [step(number, loss) for number, loss in enumerate(losses, 1)])
    assert report(tmp_path, run).figure("Training loss")


@pytest.mark.parametrize(
    ("losses", "is_log"), [([10.0, 0.001], True), ([10.0, 0.0], False), ([10.0, -1.0], False)]
)
def test_the_loss_has_a_logarithmic_axis_if_it_is_positive(tmp_path, losses, is_log):
    page = report(
        tmp_path,
        write_run(tmp_path / "a", [step(number, loss) for number, loss in enumerate(losses, 1)]),
    )
    assert ("0.01" in page.texts) == is_log


def test_the_status_and_its_reason(tmp_path):
    runs = [
        write_run(tmp_path / "a", [], status="failed", reason="worker 1 ran out of memory"),
        write_run(tmp_path / "b", [], status="stopped", reason="SIGTERM"),
        write_run(tmp_path / "c", [], status="done", reason="all epochs"),
    ]
    page = report(tmp_path, *runs)
    assert [row["Status"] for row in page.summary] == ["failed", "stopped", "done"]
    assert " failed: worker 1 ran out of memory" in page.texts
    assert " stopped: SIGTERM" in page.texts
    assert "all epochs" not in page.text


def test_only_keys_that_differ(tmp_path):
    other = changed(train__lr=0.4, norm__rules={"head": "group_norm"})
    del other["launch"]["device"]
    runs = [write_run(tmp_path / "a", []), write_run(tmp_path / "b", [], config=other)]
    assert config_differences(read_runs(runs)) == {
        "norm.rules": ["{}", None],
        "norm.rules.head": [None, "group_norm"],
        "train.lr": ["0.1", "0.4"],
        "launch.device": ["cpu", None],
    }
    page = report(tmp_path, *runs)
    assert {"train.lr", "0.4", "norm.rules.head", "not there"} <= set(page.texts)
    assert "train.epochs" not in page.texts


def test_equal_configurations(tmp_path):
    runs = [write_run(tmp_path / name, []) for name in "ab"]
    assert config_differences(read_runs(runs)) == {}
    assert "The configurations are the same." in report(tmp_path, *runs).texts


def test_one_run_shows_its_whole_configuration(tmp_path):
    run = write_run(tmp_path / "a", [])
    assert (run / "config.yaml").read_text() in report(tmp_path, run).texts


def test_names_tell_runs_apart_and_nothing_about_the_machine(tmp_path):
    runs = [write_run(tmp_path / name / "same", []) for name in ("one", "two")]
    page = report(tmp_path, *runs)
    assert [row["Run"] for row in page.summary] == ["one/same", "two/same"]
    assert str(tmp_path) not in page.text


def test_checkpoints_in_a_row_are_gathered(tmp_path):
    checkpoints = [
        {"event": "checkpoint", "time": BEGIN, "step": n, "path": f"step-{n}"}
        for n in range(2, 12, 2)
    ]
    fault = {
        "event": "fault",
        "time": BEGIN + 3725,
        "step": 7,
        "kind": "not_finite",
        "message": "left out",
    }
    page = report(
        tmp_path, write_run(tmp_path / "a", [start(), *checkpoints[:3], fault, *checkpoints[3:]])
    )
    assert page.marks == [
        ("2 to 6", "| 3 checkpoints"),
        ("7", "× fault: not finite"),
        ("8 to 10", "| 2 checkpoints"),
    ]
    times = [(row["Time"], row["Message"]) for row in page.rows if "What" in row]
    assert times[:2] == [("0:00:00", "newest: step-6"), ("1:02:05", "left out")]


def test_a_thousand_faults_are_not_a_thousand_rows(tmp_path):
    faults = [
        {"event": "fault", "step": n, "kind": "not_finite", "message": f"number {n} " * 500}
        for n in range(1000)
    ]
    run = write_run(tmp_path / "a", faults)
    page = report(tmp_path, run)
    assert page.summary[0]["Faults"] == "1,0001,000 not finite"
    assert len(page.marks) == 200
    assert "800 more are left out here" in page.text
    assert (tmp_path / "report.html").stat().st_size < 500_000


def test_a_long_run_gives_a_small_page(tmp_path):
    losses = np.exp(np.random.default_rng(0).normal(0, 0.3, 200_000)).tolist()
    run = write_run(tmp_path / "a", (step(number, loss) for number, loss in enumerate(losses, 1)))
    page = report(tmp_path, run)
    assert page.summary[0]["Steps"] == "200,000"
    assert (tmp_path / "report.html").stat().st_size < 300_000
    raw = max(page.values("d"), key=len)
    assert 1000 < raw.count("L") < 2000


def test_more_runs_than_colours(tmp_path):
    runs = [
        write_run(tmp_path / f"run-{index:02}", [start(), step(1, 1.0 + index), step(2, 0.5)])
        for index in range(14)
    ]
    page = report(tmp_path, *runs)
    assert len(page.summary) == 14
    assert {"none", "5 2", "1.5 1.5"} == set(page.values("stroke-dasharray"))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ([], "`runs` must be at least one folder of a run, got none"),
        (
            ["missing"],
            r"`runs` must be folders of runs, got '.*missing', which holds no config.yaml",
        ),
        (["empty"], r"`runs` must be folders of runs, got '.*empty', which holds no config.yaml"),
        (["a\0b"], "`runs` must be folders of runs, got "),
        (["good", "good"], r"`runs` must be different folders, got '.*good' 2 times"),
        (["good", "link"], r"`runs` must be different folders, got '.*good' 2 times"),
        (["no-mapping"], r"no-mapping/config.yaml: must be a mapping, got list"),
        (
            ["bad-yaml"],
            r"bad-yaml/config.yaml: tag tag:yaml.org,2002:python/name:os.system is not allowed",
        ),
        (["bad-exit"], r"bad-exit/exit.json: must be JSON: "),
        (["odd-exit"], r"odd-exit/exit.json: must be an object with a `status`, got \[1\]"),
        (["no-text"], r"no-text/config.yaml: must be UTF-8: invalid start byte at byte 0"),
        (["unreadable"], r"unreadable/metrics.jsonl: cannot be read: Not a regular file"),
    ],
)
def test_bad_runs(tmp_path, folders, message):
    (tmp_path / "empty").mkdir()
    good = write_run(tmp_path / "good", [])
    (tmp_path / "link").symlink_to(good)
    (write_run(tmp_path / "no-mapping", []) / "config.yaml").write_text("[1]")
    (write_run(tmp_path / "bad-yaml", []) / "config.yaml").write_text(
        "a: !!python/name:os.system x"
    )
    (write_run(tmp_path / "bad-exit", []) / "exit.json").write_text('{"status": "do')
    (write_run(tmp_path / "odd-exit", []) / "exit.json").write_text("[1]")
    (write_run(tmp_path / "no-text", []) / "config.yaml").write_bytes(b"\xff")
    unreadable = write_run(tmp_path / "unreadable", []) / "metrics.jsonl"
    unreadable.unlink()
    unreadable.mkdir()
    output = tmp_path / "report.html"
    with pytest.raises(ConfigError, match=message):
        write_report([tmp_path / folder for folder in folders], output)
    assert not output.exists()


@pytest.mark.parametrize(
    "output", ["missing/report.html", "folder", "good/config.yaml/report.html", "a\0b"]
)
def test_an_output_that_cannot_be_written(tmp_path, output):
    (tmp_path / "folder").mkdir()
    run = write_run(tmp_path / "good", [])
    with pytest.raises(
        ConfigError, match="`output` must be a file that can be written, got "
    ) as caught:
        write_report([run], tmp_path / output)
    assert repr(str(tmp_path / output)) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "good"]


def test_without_a_package(tmp_path):
    run = write_run(tmp_path / "a", [])
    code = (
        "import sys; from pathlib import Path; from syncnorm.train.report import write_report\n"
        "for missing in ('matplotlib', 'jinja2'):\n"
        "    sys.modules[missing] = None\n"
        "    try: write_report([Path(sys.argv[1])], Path(sys.argv[1]) / 'report.html')\n"
        "    except ValueError as error: print(type(error).__name__, error, sep=': ')\n"
        "    del sys.modules[missing]\n"
    )
    said = subprocess.check_output([sys.executable, "-c", code, run], text=True, timeout=900)
    assert said.splitlines() == [
        f"ConfigError: a report needs {missing}. Install it with: pip install 'syncnorm[report]'"
        for missing in ("matplotlib", "jinja2")
    ]


def test_the_fixture_writes_what_the_trainer_would(tmp_path):
    run = read_runs([write_run(tmp_path / "a", [start()])])[0]
    assert (run.config, run.status, run.name) == (CONFIG, "done", "a")
