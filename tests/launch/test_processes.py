"""The processes of a local run, without a run."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from syncnorm.run import processes
from syncnorm.run.interrupt import Stopped, for_launcher
from syncnorm.run.processes import run_processes

PATIENCE_SECONDS = 600.0


def say(folder: Path) -> None:
    facts = {
        "world_size": os.environ["WORLD_SIZE"],
        "interrupt": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
        "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "name": Path("/proc/self/comm").read_text().strip(),
        "drawn": np.random.random(),
    }
    (folder / os.environ["RANK"]).write_text(json.dumps(facts))


@pytest.mark.parametrize("forks", [True, False])
def test_each_process_knows_its_rank_and_draws_its_own_numbers(tmp_path, forks):
    np.random.seed(1)
    count = 3 if forks else 1
    run_processes(partial(say, tmp_path), count, tmp_path, forks, PATIENCE_SECONDS)
    said = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(count)]
    drawn = {each.pop("drawn") for each in said}
    assert len(drawn) == count
    expected = {"world_size": str(count), "interrupt": True, "blocked": 0}
    assert said == [{**expected, "name": f"syncnorm-{rank}"} for rank in range(count)]


def end(*statuses: int | None) -> None:
    """End this rank with its status; None: wait for a signal."""
    status = statuses[int(os.environ["RANK"])]
    if status is None:
        signal.pause()
    # The first is first.
    time.sleep(0.1 * (os.environ["RANK"] != "0"))
    os._exit(status or 0)


def statuses_of(tmp_path: Path, *statuses: int | None) -> dict[int, int]:
    with pytest.raises(ChildFailedError) as caught:
        run_processes(partial(end, *statuses), len(statuses), tmp_path, True, PATIENCE_SECONDS)
    return {rank: failure.exitcode for rank, failure in caught.value.failures.items()}


def test_the_others_have_their_last_words(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_LAST_WORDS_SECONDS", PATIENCE_SECONDS)
    assert statuses_of(tmp_path, 1, 3, 0) == {0: 1, 1: 3}


def test_the_others_do_not_outlive_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_LAST_WORDS_SECONDS", 0.1)
    assert statuses_of(tmp_path, None, 3) == {1: 3}


def fail_beside(stubborn: int, status: int) -> None:
    if int(os.environ["RANK"]) == stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            signal.pause()
    os.kill(os.getpid(), status)


def test_who_was_ended_by_the_launcher_has_not_failed(tmp_path, monkeypatch):
    """Not even who had to be killed: the cause is the other's end."""
    monkeypatch.setattr(processes, "_LAST_WORDS_SECONDS", 0.1)
    work = partial(fail_beside, 0, signal.SIGKILL)
    with pytest.raises(ChildFailedError) as caught:
        run_processes(work, 2, tmp_path, True, patience_seconds=0.1)
    assert {rank: f.exitcode for rank, f in caught.value.failures.items()} == {1: -signal.SIGKILL}


def leave_a_process_behind(folder: Path) -> None:
    pid = os.fork()
    if pid == 0:
        signal.pause()
    (folder / "left.pid").write_text(str(pid))
    os._exit(0)


def test_what_a_worker_has_started_does_not_hold_the_launcher_up(tmp_path):
    try:
        run_processes(
            partial(leave_a_process_behind, tmp_path), 1, tmp_path, True, PATIENCE_SECONDS
        )
    finally:
        os.kill(int((tmp_path / "left.pid").read_text()), signal.SIGKILL)


def wait_for_the_end(folder: Path, stubborn: int, number: int) -> None:
    rank = int(os.environ["RANK"])
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    if rank == stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if rank == 1:
        os.kill(os.getppid(), number)
    while True:
        signal.pause()


@pytest.fixture
def heeds_hangup():
    """A SIGHUP that is not ignored, as it is where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heeds_hangup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_all(tmp_path, number):
    work = partial(wait_for_the_end, tmp_path, -1, number)
    with pytest.raises(Stopped) as caught, for_launcher():
        run_processes(work, 2, tmp_path, True, PATIENCE_SECONDS)
    assert caught.value.number == number
    assert_are_gone(tmp_path)


@pytest.mark.usefixtures("heeds_hangup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_at_once_is_the_same(number):
    """What saves after the first is not cut off."""
    with for_launcher():
        with pytest.raises(Stopped):
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)


def test_who_does_not_mind_the_signal_is_killed(tmp_path):
    work = partial(wait_for_the_end, tmp_path, 1, signal.SIGTERM)
    with pytest.raises(Stopped), for_launcher():
        run_processes(work, 2, tmp_path, True, patience_seconds=0.1)
    assert_are_gone(tmp_path)


def assert_are_gone(folder: Path) -> None:
    assert (folder / "1.pid").exists()
    for path in folder.glob("*.pid"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
