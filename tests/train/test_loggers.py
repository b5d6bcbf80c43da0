"""Loggers get the figures of a run, and cannot stop it."""

import importlib.util
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from syncnorm.errors import ConfigError
from syncnorm.train.config import strict_yaml
from syncnorm.train.config.file import load_config
from syncnorm.train.config.schema import LOGGERS, Config
from syncnorm.train.loggers import LoggedRun, open_loggers
from syncnorm.train.loggers.builtin import Trackio
from syncnorm.train.loggers.guarded import GuardedLogger
from tests.train import runs

SHORT = ["train.epochs=1", "train.global_batch=500", "follow.every=1"]


def train(pool, folder, loggers, *options, workers=1):
    sections = load_config("digits", [*SHORT, *options]).model_dump()
    sections["follow"]["loggers"] = loggers
    folder.mkdir(exist_ok=True)
    pool(workers).run(runs.train_sections, str(folder), sections)


def logger_faults(folder):
    return [each["message"] for each in runs.events(folder, "fault") if each["kind"] == "logger"]


def test_a_logger_gets_the_run_and_its_figures(pool, tmp_path):
    own = {"tests.train.loggers:Keeps": {"file": "mine.jsonl"}}
    train(pool, tmp_path, own, "name=first", "tags=[a, b c]", workers=2)
    start, *logged, end = map(json.loads, (tmp_path / "mine.jsonl").read_text().splitlines())
    assert start == {"name": "first", "tags": ["a", "b c"], "lr": 0.1, "before": None}
    assert end == "closed"
    steps = runs.events(tmp_path, "step")
    speeds = [each for each in logged if "loss" in each]
    assert [each["step"] for each in speeds] == [1, 2, 3]
    assert [each["loss"] for each in speeds] == [each["loss"] for each in steps]
    intervals = runs.events(tmp_path, "interval")
    for name in ("samples_per_second", "exchange_share", "seconds"):
        assert [each[name] for each in speeds] == [each[name] for each in intervals]
    (epoch,) = runs.events(tmp_path, "epoch")
    assert {"step": 3, "test_accuracy": epoch["test_accuracy"]}.items() <= logged[-1].items()
    (start_event,) = runs.events(tmp_path, "start")
    assert (start_event["name"], start_event["tags"]) == ("first", ["a", "b c"])
    assert logger_faults(tmp_path) == []


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_a_logger_gets_each_evaluation_once(share, pool, tmp_path):
    own = {"tests.train.loggers:Keeps": {}}
    train(pool, tmp_path, own, f"data.validation={share}", "train.epochs=2")
    _, *logged, _ = map(json.loads, (tmp_path / "kept.jsonl").read_text().splitlines())
    named = [{name for name in each if "accuracy" in name} for each in logged]
    every, last = ("validation", [{"test_accuracy"}]) if share else ("test", [])
    assert [each for each in named if each] == [{f"{every}_accuracy"}] * 2 + last


def test_a_resumed_run_has_its_id_and_may_have_another_name(pool, tmp_path):
    own = {"tests.train.loggers:Keeps": {}}
    train(pool, tmp_path, own)
    train(pool, tmp_path, own, "name=second", "tags=[new]")
    lines = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    starts = [line for line in lines if "name" in line]
    assert [(line["name"], line["before"]) for line in starts] == [
        (tmp_path.name, None),
        ("second", "id-1"),
    ]


class Spoils:
    """Changes all that it is given."""

    def __init__(self, run: LoggedRun) -> None:
        run.config.clear()

    def log(self, step: int, figures: dict[str, float]) -> None:
        figures.clear()

    def close(self) -> None:
        raise KeyboardInterrupt


class Sees:
    """Notes what it is given."""

    seen: list[Any] = []  # noqa: RUF012 of all

    def __init__(self, run: LoggedRun) -> None:
        self.seen.append(run.config["train"]["epochs"])

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.seen.append(figures)

    def close(self) -> None:
        pass


def test_loggers_share_nothing_and_end_by_whatever_they_raise(tmp_path):
    names = [f"{__name__}:Spoils", f"{__name__}:Sees"]
    config = load_config("digits", [])
    follow = config.follow.model_copy(update={"loggers": {name: {} for name in names}})
    config = config.model_copy(update={"follow": follow})
    spoils, sees = opened = open_loggers(config, tmp_path, ("tests",))
    figures = {"loss": 1.0}
    for logger in opened:
        logger.log(1, figures)
    for logger in opened:
        logger.close(60.0)
        assert logger.is_over(60.0)
    assert figures == {"loss": 1.0}
    assert Sees.seen == [config.train.epochs, {"loss": 1.0}]
    (fault,) = spoils.pop_faults()
    assert fault.endswith("is dropped, the run goes on: KeyboardInterrupt")
    assert sees.pop_faults() == []


@pytest.mark.parametrize("method", ["__init__", "log", "close"])
def test_a_logger_that_raises_is_dropped_and_the_run_goes_on(method, pool, tmp_path):
    both = {"tests.train.loggers:Raises": {"method": method}, "tests.train.loggers:Keeps": {}}
    train(pool, tmp_path, both)
    assert logger_faults(tmp_path) == [
        "logger tests.train.loggers:Raises is dropped, the run goes on: RuntimeError: "
        f"no {method} today"
    ]
    assert len(runs.events(tmp_path, "step")) == 3
    assert len(runs.events(tmp_path, "end")) == 1
    assert (tmp_path / "kept.jsonl").read_text().endswith('"closed"\n')


def test_a_class_that_is_not_there_is_one_error_on_all_workers(pool):
    # No mapping with a colon in a key can be given as an override.
    sections = load_config("digits", SHORT).model_dump()
    sections["follow"]["loggers"] = {"tests.train.loggers:Missing": {}}
    one, other = pool(2).run(runs.refused_sections, sections)
    assert one == other
    assert one.startswith("`follow.loggers` must name what can be imported, got 'tests.train.")


def test_a_package_that_is_missing_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in (("wandb", "wandb"), ("tensorboard", "'syncnorm[tensorboard]'")):
        with pytest.raises(ConfigError, match="is not installed") as caught:
            open_loggers(load_config("digits", [f"follow.loggers.{name}={{}}"]), tmp_path)
        assert str(caught.value).endswith(f"pip install {package}")


class Stuck:
    """Hangs in one method until it is let go."""

    def __init__(self, method):
        self.method, self.go, self.is_in = method, threading.Event(), threading.Event()
        self._hang("__init__")

    def _hang(self, method):
        if method == self.method:
            self.is_in.set()
            assert self.go.wait(60)

    def log(self, step, figures):
        self._hang("log")

    def close(self):
        self._hang("close")


@pytest.mark.parametrize("method", ["log", "close"])
def test_a_logger_that_hangs_is_left_behind(method):
    stuck = Stuck(method)
    guarded = GuardedLogger("mine", lambda: stuck)
    guarded.log(1, {})
    guarded.close(0.05)
    assert stuck.is_in.wait(60)
    began = time.monotonic()
    while not guarded.is_over(0.05):
        assert time.monotonic() - began < 60
    assert guarded.pop_faults() == [
        "logger mine is dropped, the run goes on: not closed within 0.05 seconds"
    ]
    assert guarded.pop_faults() == []
    stuck.go.set()


def test_a_logger_that_cannot_follow_is_dropped():
    go = threading.Event()
    guarded = GuardedLogger("mine", lambda: go.wait(60))
    for step in range(1002):
        guarded.log(step, {})
    (fault,) = guarded.pop_faults()
    assert "1000 steps behind" in fault
    go.set()


def test_the_page_is_as_it_is(tmp_path, capsys):
    page = (Path(__file__).parents[2] / "docs" / "loggers.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    config = load_config("digits").model_dump() | strict_yaml.parse(text, "loggers.md")
    options = Config(**config).follow.loggers
    assert set(LOGGERS) < set(options)
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "loggers.md", "exec"), names)
    printer = names["Printer"](LoggedRun("a", (), {}, tmp_path), **options["mine.loggers:Printer"])
    printer.log(3, {"loss": 0.5})
    printer.close()
    assert capsys.readouterr().out == ">  3 {'loss': 0.5}\n"


def test_ids_of_a_folder_are_not_trusted(tmp_path):
    run = LoggedRun("a", (), {}, tmp_path)
    run.remember("wandb", "abc-1_2")
    assert run.recall("wandb") == "abc-1_2"
    for text in ('{"wandb": "../x"}', '{"wandb": 3}', "[1]", "{", '{"wandb": ""}'):
        (tmp_path / "loggers.json").write_text(text)
        assert run.recall("wandb") is None


def test_wandb_offline(pool, tmp_path):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for _ in range(2):
        train(pool, tmp_path, {"wandb": {"mode": "offline", "project": "x"}}, "tags=[a]")
    assert logger_faults(tmp_path) == []
    first, second = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert first.name == second.name
    assert json.loads((tmp_path / "loggers.json").read_text())["wandb"] in first.name
    assert wandb.run is None


def test_mlflow_on_a_local_store(pool, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    for package in ("sqlalchemy", "alembic"):
        pytest.importorskip(package, reason=f"{package}, for MLflow's database, is not installed")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("mine")  # and the tables, which takes its time
    run = tmp_path / "run"
    for name in ("first", "second"):
        options = {"mlflow": {"tracking_uri": uri, "experiment": "mine"}}
        train(pool, run, options, f"name={name}", "tags=[a]")
    assert logger_faults(run) == []
    (found,) = client.search_runs([experiment])
    assert found.info.run_name == "first"
    assert found.info.status == "FINISHED"
    assert found.data.params["train.lr"] == "0.1"
    assert "a" in found.data.tags["tags"].split(", ")
    points = client.get_metric_history(found.info.run_id, "loss")
    assert [(p.step, p.value) for p in points] == [
        (event["step"], event["loss"]) for event in runs.events(run, "step")
    ]


def test_trackio_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # it reads that once, as it is imported
    pytest.importorskip("trackio", reason="trackio is not installed")
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    run = LoggedRun("mine", ("a",), {"train": {"lr": 0.1}}, tmp_path)
    for step in (1, 2):
        logger = Trackio(run, project="x")
        logger.log(step, {"loss": 0.5 / step})
        logger.close()
    assert storage.get_runs("x") == ["mine"], "the second went on in the first"
    assert [(each["step"], each["loss"]) for each in storage.get_logs("x", "mine")] == [
        (1, 0.5),
        (2, 0.25),
    ]
