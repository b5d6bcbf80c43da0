"""Saves in the background, and what a full disk does to them."""

import os
import resource
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch

from syncnorm.errors import InputError
from syncnorm.train import files
from syncnorm.train.callbacks import Callback
from syncnorm.train.checkpoint.capture import Progress
from syncnorm.train.checkpoint.saver import BackgroundSaver, SaveResult
from syncnorm.train.checkpoint.snapshot import Snapshot
from syncnorm.train.checkpoint.store import CheckpointStore
from syncnorm.train.config.file import load_config
from syncnorm.train.loop import train
from tests.train import runs
from tests.train.snapshots import assert_equal, make_snapshot, names

ROOT = Path(__file__).parents[2]


class Gate:
    """Files open only once it is open."""

    def __init__(self) -> None:
        self.reached, self.is_open = threading.Event(), threading.Event()

    def open_to_write(self, path: Path):
        self.reached.set()
        assert self.is_open.wait(900)
        return path.open("wb")


@pytest.fixture
def gate(monkeypatch):
    gate = Gate()
    monkeypatch.setattr(files, "open_to_write", gate.open_to_write)
    yield gate
    gate.is_open.set()


def test_it_writes_what_was_while_training_goes_on(store, gate):
    saver = BackgroundSaver(store)
    snapshot = make_snapshot()
    assert saver.start(snapshot, is_best=True) is True
    assert gate.reached.wait(900)
    # under way: training goes on, and nothing else is saved
    snapshot.tensors["model"]["weight"].fill_(-1)
    snapshot.states["optimizer"]["lr"] = 0
    assert saver.start(make_snapshot(13)) is False
    assert saver.pop_results() == []
    gate.is_open.set()
    saver.wait()

    path = store.folder / "step-00000012"
    (result,) = saver.pop_results()
    assert (result.step, result.path, result.error) == (12, path, None)
    assert result.seconds > 0
    assert_equal(store.read(path), make_snapshot())
    assert store.best() == path
    assert names(store.folder) == ["best.json", "step-00000012"]
    assert saver.pop_results() == []


def test_one_after_the_other(store):
    saver = BackgroundSaver(store)
    saver.wait()
    for step in (1, 2, 3):
        assert saver.start(make_snapshot(step))
        saver.wait()
    assert [result.step for result in saver.pop_results()] == [1, 2, 3]
    assert names(store.folder) == ["step-00000001", "step-00000002", "step-00000003"]


def test_a_save_that_fails_is_a_result_and_the_next_one_may_not(store, monkeypatch):
    store.write(make_snapshot(1))

    def fail(path):
        raise OSError(30, "Read-only file system", str(path))

    saver = BackgroundSaver(store)
    with monkeypatch.context() as patch:
        patch.setattr(files, "open_to_write", fail)
        saver.start(make_snapshot(2))
        saver.wait()
    (result,) = saver.pop_results()
    assert (result.step, result.path) == (2, None)
    assert result.error is not None
    assert result.error.startswith(
        f"step 2 could not be saved in {store.folder}: [Errno 30] Read-only file system"
    )
    assert names(store.folder) == ["step-00000001"]
    assert saver.start(make_snapshot(3))
    saver.wait()
    assert names(store.folder) == ["step-00000001", "step-00000003"]


def test_a_store_that_is_taken_is_a_result(store):
    store.write(make_snapshot(1))
    saver = BackgroundSaver(store)
    with files.only_writer(store.folder):
        saver.start(make_snapshot(2))
        saver.wait()
    (result,) = saver.pop_results()
    assert "Somebody else is writing there" in str(result.error)


def test_a_snapshot_that_cannot_be_written_is_an_error_of_the_program(store):
    saver = BackgroundSaver(store)
    with pytest.raises(
        InputError, match=r"`states\['rng'\]` must be a tensor, a plain value or a container"
    ):
        saver.start(Snapshot(1, {}, {"rng": object()}, {}))
    assert saver.start(
        Snapshot(1, {"model": {"a": torch.zeros(1, dtype=torch.complex128)}}, {}, {})
    )
    saver.wait()
    with pytest.raises(
        InputError, match=r"must be of types that safetensors has, got torch\.complex128"
    ):
        saver.pop_results()
    assert saver.start(make_snapshot(2))
    saver.wait()
    assert [result.error for result in saver.pop_results()] == [None]


def run(code: str, *, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-c", f"from tests.train import test_saver as t\n{code}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


def test_a_save_under_way_is_finished_when_the_program_ends(tmp_path):
    store = CheckpointStore(tmp_path)
    done = run(
        f"t.BackgroundSaver(t.CheckpointStore(t.Path({str(tmp_path)!r}))).start(t.make_snapshot(5))"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert store.newest()[1:] == (tmp_path / "step-00000005", [])


class _Fails(Callback):
    def on_step(self, run, loss):
        if run.progress.step == 3:
            raise RuntimeError("in step 3")


def fails_while_saving(folder: str) -> list[str]:
    """Train until an error comes while the state of step 2 is being written; what is there then."""
    begun, released = threading.Event(), threading.Event()
    write, wait = CheckpointStore.write, BackgroundSaver.wait

    def slowly(self, *args, **kwargs):
        begun.set()
        assert released.wait(900)
        return write(self, *args, **kwargs)

    def until_it_is_there(self, seconds=None):
        released.set()
        wait(self, seconds)

    config = load_config("digits", ["train.epochs=1", "checkpoint.every=2"])
    with (
        mock.patch.object(CheckpointStore, "write", slowly),
        mock.patch.object(BackgroundSaver, "wait", until_it_is_there),
        pytest.raises(RuntimeError, match="in step 3"),
    ):
        train(config, runs.workers(), Path(folder), Progress(), runs.Free(), (), [_Fails()])
    found = names(Path(folder) / "checkpoints")
    released.set()
    assert begun.is_set()
    return found


def test_a_save_under_way_is_finished_when_the_run_fails(pool, tmp_path):
    assert pool(1).run(fails_while_saving, str(tmp_path)) == [["step-00000002"]]


# A full disk


def make_large(step: int) -> Snapshot:
    large = torch.full((1 << 17,), float(step))  # half a MiB
    return Snapshot(step, {"model": {"a": large}}, {"optimizer": large.clone()}, {"step": step})


def save_in(saver: BackgroundSaver, snapshot: Snapshot) -> SaveResult:
    assert saver.start(snapshot, is_best=True)
    saver.wait()
    (result,) = saver.pop_results()
    return result


def fill_by_limit(folder: Path) -> None:
    """Files may not grow above a limit; runs in a process of its own."""
    saver = BackgroundSaver(CheckpointStore(folder))
    assert save_in(saver, make_large(1)).error is None
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))
    check_full(save_in(saver, make_large(2)), folder, "[Errno 27] File too large")
    assert save_in(saver, make_snapshot(3)).error is None
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert save_in(saver, make_large(4)).error is None


def fill_tmpfs(mount: Path) -> None:
    """Save to a small file system with too little room left, page by page.

    Runs in a process and mounts of its own.
    """
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(mount)], capture_output=True
    ).returncode:
        print("may not mount")
        return
    folder, filler = mount / "checkpoints", mount / "filler"
    saver = BackgroundSaver(CheckpointStore(folder, keep=1))
    assert save_in(saver, make_large(1)).error is None

    opened: list[Path] = []
    files.open_to_write = lambda path: (opened.append(path), path.open("wb"))[1]
    last = Counter()
    for pages in [0, 64, 200, *range(250, 300)]:
        filler.write_bytes(b"")
        free = os.statvfs(mount)
        filler.write_bytes(bytes((free.f_bavail - pages) * free.f_bsize))
        if is_saved(saver, folder):
            break
        last[opened[-1].name] += 1
    # it ended in each of the files
    assert list(last) == [
        "model.safetensors",
        "optimizer.pt",
        "state.json",
        "manifest.json",
        ".tmp-best.json",
    ], last
    assert names(folder) == ["best.json", "step-00000002"]


def is_saved(saver: BackgroundSaver, folder: Path) -> bool:
    result = save_in(saver, make_large(2))
    if result.error is not None:
        check_full(result, folder, "[Errno 28] No space left on device")
    return result.error is None


def check_full(result: SaveResult, folder: Path, error: str) -> None:
    assert (result.step, result.path) == (2, None), result
    assert error in str(result.error), result
    assert names(folder) == ["best.json", "step-00000001"], names(folder)
    store = CheckpointStore(folder)
    snapshot, path, faults = store.newest()
    assert_equal(snapshot, make_large(1))
    assert (store.best(), faults) == (path, [])


def test_a_limit_on_the_size_of_files(tmp_path):
    done = run(f"t.fill_by_limit(t.Path({str(tmp_path)!r}))")
    assert (done.returncode, done.stderr) == (0, "")
    assert names(tmp_path) == ["best.json", *(f"step-0000000{step}" for step in (1, 3, 4))]


def test_a_full_disk(tmp_path):
    private = ("unshare", "--user", "--map-root-user", "--mount")
    try:
        subprocess.run([*private, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs a mount name space of its own: {error}")
    done = run(f"t.fill_tmpfs(t.Path({str(tmp_path)!r}))", prefix=private)
    assert (done.returncode, done.stderr) == (0, "")
    if done.stdout == "may not mount\n":
        pytest.skip("needs to mount a tmpfs")
    assert names(tmp_path) == []  # it was another file system
