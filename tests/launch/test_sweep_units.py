"""What of a sweep needs no Ray: its trials, their names and configurations, and the results."""

import json
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from syncnorm.errors import ConfigError
from syncnorm.run import env
from syncnorm.run.ending import Exit
from syncnorm.run.folder import lock
from syncnorm.run.ray import results
from syncnorm.run.ray.job import prepare_folder
from syncnorm.run.ray.space import Space, read_space, split_grids
from syncnorm.run.ray.sweep import Sweep, choose_sweep, make_sweep, write_record
from syncnorm.train.metrics import MetricsFile

GRID = ["train.lr=0.05,0.1", "train.epochs=1", "norm.sync=batch,running"]


def test_values_with_commas_are_tried_and_others_replaced():
    fixed, grids = split_grids(
        ["train.lr=0.1,1e-3", "launch.workers=[1,2]", "train.epochs=3", "norm.sync=batch,none"]
    )
    assert fixed == ["launch.workers=[1,2]", "train.epochs=3"]
    assert grids == {"train.lr": [0.1, 0.001], "norm.sync": ["batch", "none"]}


def test_a_grid_has_every_combination_and_draws_repeat_for_the_same_seed():
    space = Space(
        {"train.epochs": [1, 2]},
        {
            "train.lr": {"loguniform": [0.001, 1]},
            "train.clip": {"uniform": [1, 2]},
            "train.seed": {"randint": [3, 5]},
            "norm.sync": {"choice": ["batch", "none"]},
        },
        samples=20,
        seed=7,
    )
    trials = space.trials()
    assert trials == space.trials()
    assert len(trials) == 40
    assert [trial["train.epochs"] for trial in trials[:4]] == [1, 2, 1, 2]
    assert all(0.001 <= trial["train.lr"] <= 1 for trial in trials)
    assert sum(trial["train.lr"] < 0.03 for trial in trials) in range(10, 31)
    assert all(1 <= trial["train.clip"] <= 2 for trial in trials)
    assert {trial["train.seed"] for trial in trials} == {3, 4, 5}
    assert {trial["norm.sync"] for trial in trials} == {"batch", "none"}
    assert len({trial["train.lr"] for trial in trials}) > 30
    assert Space({}, space.draws, 20, seed=8).trials() != Space({}, space.draws, 20, 7).trials()


def test_a_value_is_tried_once():
    with pytest.raises(ConfigError, match=r"`train.lr` must have each value once in a sweep, got"):
        Space({"train.lr": [0.1, 0.2, 0.1]}, {}).trials()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("samples: 3", "must have a section `sweep`"),
        ("sweep: {train.lr: [1]}\nsample: 3", "got sample"),
        ("sweep: {train.lr: {loguniform: [0, 1]}}", "got {'loguniform': \\[0, 1\\]}"),
        ("sweep: {train.lr: {normal: [0, 1]}}", "got {'normal': \\[0, 1\\]}"),
        ("sweep: {train.lr: {uniform: [2, 1]}}", "got {'uniform': \\[2, 1\\]}"),
        ("sweep: {train.epochs: {randint: [1, 2.5]}}", "got {'randint': \\[1, 2.5\\]}"),
        (f"sweep: {{train.lr: {{uniform: [1, {10**400}]}}}}", "got {'uniform'"),
        ("sweep: {train.lr: 3}", "`train.lr` must be a list of values.*got 3"),
        ("sweep: {train.lr: {uniform: [1, 2]}}\nsamples: 0", "`samples` must be .* got 0"),
        ("sweep: {train.lr: [1, 2]}\nsamples: 2", "`samples` must be 1 .* got 2"),
        ("sweep: {run_dir: [a, b]}", "got 'run_dir'"),
    ],
)
def test_what_is_no_space(tmp_path, text, message):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_space(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.lr=0.1"], "1 to 1000 trials, got 0"),
        (["train.lr=0.1,-1"], "trial 1: `train.lr` must be .*greater than 0"),
        (["train.learning=0.1,1"], "`train.learning` is not a key"),
        (["launch.workers=1,2"], "must vary keys of .* got 'launch.workers'"),
        (["model.name=a:b,c:d"], "--allow a"),
    ],
)
def test_every_trial_is_checked_before_anything_starts(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        make_sweep("digits", arguments)
    assert list(tmp_path.iterdir()) == []


def test_trials_are_runs_named_by_what_varies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = make_sweep("digits", [*GRID, "launch.workers=2"])
    assert Sweep.from_json(sweep.to_json()) == sweep
    assert Path(sweep.folder).parent == tmp_path / "runs"
    assert Path(sweep.folder).name == sweep.submission_id
    assert sweep.names()[:2] == ["trial-00-lr=0.05-sync=batch", "trial-01-lr=0.05-sync=running"]
    job = sweep.job(3)
    assert job.folder == f"{sweep.folder}/trial-03-lr=0.1-sync=running"
    config = job.request().config
    assert (config.train.lr, config.norm.sync, config.train.epochs) == (0.1, "running", 1)
    assert config.launch.workers == 2
    assert make_sweep("digits", GRID, is_dated=False) == make_sweep("digits", GRID, is_dated=False)
    assert make_sweep("digits", [*GRID, "name=other"]).submission_id.startswith("other-sweep-")


def test_a_section_that_varies_keeps_what_is_given_of_it(tmp_path, monkeypatch):
    """Whatever the order in which they are given."""
    monkeypatch.chdir(tmp_path)
    sections = ["train.optimizer=SGD,AdamW", "train.schedule=linear,constant"]
    fixed = ["train.optimizer.weight_decay=0.01", "train.schedule.warmup=0.3", "train.lr=0.2"]
    for arguments in ([*sections, *fixed], [*fixed, *sections]):
        sweep = make_sweep("digits", arguments)
        assert len(sweep.trials) == 4
        for number, name in enumerate(sweep.names()):
            train = sweep.config(number).train
            assert train.optimizer.options["weight_decay"] == 0.01
            assert (train.schedule.warmup, train.lr) == (0.3, 0.2)
            assert f"optimizer={train.optimizer.name}" in name
            assert "lr=" not in name
    (tmp_path / "space.yaml").write_text(
        "sweep: {train.optimizer: {choice: [SGD, AdamW]}}\nsamples: 8"
    )
    values = ["train.optimizer.weight_decay=0.1,0.01"]
    sweep = make_sweep("digits", values, space=tmp_path / "space.yaml")
    decays = [
        sweep.config(number).train.optimizer.options["weight_decay"]
        for number in range(len(sweep.trials))
    ]
    assert decays == [0.1, 0.01] * 8


@pytest.mark.parametrize("bounds", [(0.123451, 0.123459), (0.99996, 0.99999), (3.0, 3.0)])
@pytest.mark.parametrize("kind", ["uniform", "loguniform"])
def test_draws_stay_within_their_bounds(kind, bounds):
    space = Space({}, {"train.lr": {kind: list(bounds)}}, samples=20)
    for trial in space.trials():
        assert bounds[0] <= trial["train.lr"] <= bounds[1]


def test_asha_wants_a_validation_set():
    with pytest.raises(ConfigError, match="`--asha` must have a validation set"):
        make_sweep("digits", GRID, is_asha=True)
    assert make_sweep("digits", [*GRID, "data.validation=0.1"], is_asha=True).is_asha


def test_a_sweep_goes_on_with_its_own_trials_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"space": None, "allowed": (), "is_asha": False, "concurrent": 3, "is_dated": True}
    with pytest.raises(ConfigError, match="a sweep must be given a configuration"):
        choose_sweep(None, [], resume=None, **options)
    with pytest.raises(
        ConfigError, match="must name a sweep's folder, got 'nowhere', which has no"
    ):
        choose_sweep(None, [], resume=Path("nowhere"), **options)
    sweep = make_sweep("digits", GRID)
    Path(sweep.folder).mkdir(parents=True)
    write_record(sweep, [{"metrics": {"test": {"loss": float("nan")}}}], None)
    folder = Path(sweep.folder)
    # As JSON has it, for programs of other languages.
    json.loads((folder / "sweep.json").read_text(), parse_constant=pytest.fail)
    found = choose_sweep(None, [], resume=folder, **options)
    assert (found.trials, found.folder, found.concurrent) == (sweep.trials, sweep.folder, 3)
    assert choose_sweep("digits", GRID, resume=folder, **options).trials == sweep.trials
    with pytest.raises(ConfigError, match="whose trials are others"):
        choose_sweep("digits", ["train.lr=0.05,0.2", *GRID[1:]], resume=folder, **options)


def test_one_sweep_is_run_by_one_process(tmp_path, monkeypatch):
    from syncnorm.run.ray import tune

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tune, "_resources", lambda config: {})
    sweep = make_sweep("digits", GRID)
    folder = Path(sweep.folder)
    folder.mkdir(parents=True)
    write_record(sweep, [], None)
    before = (folder / "sweep.json").read_bytes()
    with closing(lock(folder)):
        with pytest.raises(ConfigError, match="is being trained by another process"):
            tune.run_sweep(sweep)
    assert (folder / "sweep.json").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["run.lock", "sweep.json"]


def write_trial(sweep: Sweep, number: int, status: Any, values: list[float], code: int = 0) -> None:
    folder = prepare_folder(sweep.job(number))
    file = MetricsFile(folder / "metrics.jsonl")
    for epoch, value in enumerate(values, start=1):
        file.write_timed(
            "epoch", epoch=epoch, step=epoch, loss=1.0, lr=0.1, seconds=1.0,
            validation_accuracy=value,
        )  # fmt: skip
    metrics = {"validation": {"accuracy": values[-1]}, "test": {"accuracy": 0.99}} if values else {}
    Exit(status, "reason", len(values), code, metrics).write(folder)


def test_the_best_is_chosen_by_validation_and_failures_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = make_sweep("digits", GRID, allowed=["mine"])
    write_trial(sweep, 0, "done", [0.5, 0.7])
    write_trial(sweep, 1, "done", [0.9, 0.6])
    write_trial(sweep, 2, "failed", [0.95], 1)
    assert results.exit_code(results.read_results(sweep, "accuracy")) == 1
    write_trial(sweep, 3, "stopped", [0.1], 0)
    found = results.read_results(sweep, "accuracy")
    assert [each.status for each in found] == ["done", "done", "failed", "early"]
    assert [each.best for each in found] == [0.7, 0.9, 0.95, 0.1]
    best = results.best_of(found, "accuracy")
    assert best is not None
    assert best.trial == "trial-01-lr=0.05-sync=running"
    worst = results.best_of(found, "-accuracy")
    assert worst is not None
    assert worst.trial == "trial-03-lr=0.1-sync=running"
    lines = results.write_results(sweep, found, "accuracy")
    assert lines[-1] == sweep.folder
    assert f"best trial: {best.trial}, validation accuracy 90.00 %" in lines
    (use,) = (line for line in lines if line.startswith("to use it: "))
    assert f"syncnorm predict {sweep.folder}/{best.trial} FILES --allow mine; " in use
    assert "trial-02-lr=0.1-sync=batch: reason" in lines
    folder = Path(sweep.folder)
    record = json.loads((folder / "sweep.json").read_text())
    assert record["best"] == best.trial
    assert [each["status"] for each in record["trials"]] == [each.status for each in found]
    table = (folder / "sweep.csv").read_text().splitlines()
    assert len(table) == 5
    assert table[2] == "01,0.05,running,done,2,90.00 %,99.00 %"
    assert best.trial in (folder / "report.html").read_text()


def test_where_all_have_failed_none_is_the_best(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = make_sweep("digits", GRID)
    for number in range(4):
        write_trial(sweep, number, "failed", [], 1)
    found = results.read_results(sweep, "accuracy")
    assert "no best trial: all have failed" in results.write_results(sweep, found, "accuracy")


def test_paths_that_vary_are_the_clusters_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = make_sweep("digits", ["model.weights=a,b", "data.root=null"])
    assert [sweep.config(n).model.weights for n in range(2)] == [str(tmp_path / n) for n in "ab"]


def test_without_a_validation_set_none_is_the_best(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = make_sweep("digits", GRID)
    for number in range(4):
        write_trial(sweep, number, "done" if number else "stopped", [], 0 if number else 75)
    found = results.read_results(sweep, "accuracy")
    assert results.best_of(found, "accuracy") is None
    assert results.exit_code(found) == 75
    lines = results.write_results(sweep, found, "accuracy")
    assert any(line.startswith("no best trial: there is no validation set") for line in lines)


@pytest.mark.parametrize("has_code", [False, True])
def test_a_trial_finds_modules_of_the_working_folder_where_code_was_allowed(
    has_code, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), "/elsewhere"])
    places = env.trial_environment(has_code=has_code)["PYTHONPATH"].split(os.pathsep)
    assert places == ["/elsewhere", *[str(tmp_path)] * has_code]
