"""The driver of a Ray job and what its workers raise, without a cluster."""

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from types import SimpleNamespace

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'syncnorm[ray]'")

from ray.exceptions import RayActorError
from ray.train import WorkerGroupError

from syncnorm.errors import ExchangeError, FaultError, InputError
from syncnorm.run.ending import Exit, read_exit
from syncnorm.run.folder import lock
from syncnorm.run.ray import driver, worker
from syncnorm.run.ray.cluster import capacity_of
from syncnorm.run.ray.job import STOP, make_job, prepare_folder
from syncnorm.run.ray.worker import WorkerResult

TWO_CPUS = {"CPU": 2.0, "memory": 1e9}


class Fits:
    """A trainer of Ray's whose attempts end as they are told to."""

    def __init__(self, *ends):
        self._ends = list(ends)

    def fit(self):
        end = self._ends.pop(0)
        return SimpleNamespace(return_value=asdict(end() if callable(end) else end))


@pytest.mark.parametrize("kind", [InputError, ExchangeError])
def test_what_one_worker_alone_may_raise_ends_it(tmp_path, monkeypatch, kind):
    """A result would leave it alive, and the others waiting for it."""
    job = make_job("digits", [f"run_dir={tmp_path}"], (), "run").to_json()
    (tmp_path / "run").mkdir()

    def fails(*_):
        raise error

    monkeypatch.setattr(worker, "_train", fails)
    error: Exception = FaultError("of all")
    assert worker.work({"job": job}) == {"exit_code": 1, "lines": ["of all"]}
    error = kind("of this one")
    with pytest.raises(kind):
        worker.work({"job": job})
    text = (tmp_path / "run" / "traceback.txt").read_text()
    assert text.startswith(f"worker ? failed: {kind.__name__}: of this one\n")


@pytest.fixture
def drive(tmp_path, monkeypatch) -> Callable[..., int]:
    """drive(*ends, **launch): drive a job of such attempts in tmp_path / "run", without a cluster."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(driver.ray, "init", lambda **_: None)
    monkeypatch.setattr(driver, "read_capacity", lambda *_: capacity_of([TWO_CPUS], "cpu", 1))
    monkeypatch.setattr(driver, "read_reserved", lambda _: {})
    monkeypatch.setattr(driver, "StopHandler", lambda _: SimpleNamespace(is_asked=False))

    def run(*ends, workers=2, restarts=1):
        fits = Fits(*ends)
        monkeypatch.setattr(driver, "_trainer", lambda *_: fits)
        keys = [f"run_dir={tmp_path}", f"launch.workers={workers}", f"launch.restarts={restarts}"]
        return driver.main([make_job("digits", keys, (), "run").to_json()])

    return run


def test_a_second_driver_leaves_a_running_run_alone(drive, tmp_path, capsys):
    prepare_folder(make_job("digits", [f"run_dir={tmp_path}"], (), "run"))
    (tmp_path / "run" / STOP).touch()
    with closing(lock(tmp_path / "run", "driver.lock")):
        assert drive(WorkerResult(0, [])) == 2
    assert "is being trained by another process. Stop that one first." in capsys.readouterr().err
    assert (tmp_path / "run" / STOP).exists()
    assert not (tmp_path / "run" / "exit.json").exists()


def test_code_that_fails_is_named_with_no_restart_left(drive, tmp_path, capsys):
    (tmp_path / "run").mkdir()

    def fails():
        (tmp_path / "run" / "traceback.txt").write_text("worker 1 failed: ValueError: mine\n\n...")
        raise WorkerGroupError("lost", {1: ValueError("mine")})

    assert drive(fails, restarts=0) == 1
    end = read_exit(tmp_path / "run")
    assert end is not None
    assert end.reason == "worker 1 failed: ValueError: mine"
    assert capsys.readouterr().err.endswith(f"{end.reason}; {tmp_path}/run/traceback.txt\n")


def test_a_lost_controller_is_started_again(drive, tmp_path, capsys):
    def loses():
        raise RayActorError(error_msg="killed")

    assert drive(loses, WorkerResult(0, ["done"]), restarts=1) == 0
    assert "syncnorm: Ray's controller was lost; starting again\n" in capsys.readouterr().err
    assert drive(loses, loses, restarts=1) == 1
    end = read_exit(tmp_path / "run")
    assert end is not None
    assert end.reason.startswith("Ray's controller was lost 2 time(s), the last time ")


@pytest.mark.parametrize("workers", [2, 3], ids=["by_workers", "for_room"])
def test_a_run_that_is_refused_keeps_its_record(drive, tmp_path, capsys, workers):
    (tmp_path / "run").mkdir()
    end = Exit("stopped", "asked to", 3, 75)
    end.write(tmp_path / "run")
    assert drive(WorkerResult(2, ["`data.root` must be there"]), workers=workers) == 2
    said = "syncnorm: `data.root` must be" if workers == 2 else "syncnorm: `launch.workers` must be"
    assert capsys.readouterr().err.startswith(said)
    assert read_exit(tmp_path / "run") == end
