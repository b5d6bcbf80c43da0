"""The checkpoints of a run: those that are kept, the newest, the best, and their names."""

import os
import shutil
from pathlib import Path

import pytest

from syncnorm.errors import CheckpointError, InputError
from syncnorm.train import files
from syncnorm.train.checkpoint.store import CheckpointStore
from tests.train.snapshots import NEW, OLD, assert_equal, make_snapshot, names


def test_a_run_whose_folder_is_gone_does_not_come_back_in_part(tmp_path):
    store = CheckpointStore(tmp_path / "gone" / "checkpoints")
    with pytest.raises(FileNotFoundError):
        store.write(make_snapshot(1))
    assert not (tmp_path / "gone").exists()


def test_the_newest_are_kept_and_the_best(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.newest() == (None, None, [])
    assert store.best() is None
    for step in range(1, 7):
        store.write(make_snapshot(step), is_best=step == 2)
    assert names(store.folder) == ["best.json", "step-00000002", "step-00000005", "step-00000006"]
    assert store.best() == store.folder / "step-00000002"
    snapshot, path, faults = store.newest()
    assert_equal(snapshot, make_snapshot(6))
    assert (path, faults) == (store.folder / "step-00000006", [])

    store.write(make_snapshot(7), is_best=True)
    assert names(store.folder) == ["best.json", "step-00000006", "step-00000007"]
    with pytest.raises(InputError, match="`keep` must be at least 1, got 0"):
        CheckpointStore(tmp_path, keep=0)


def test_steps_are_numbers_also_where_the_name_grows(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (99_999_998, 99_999_999, 100_000_000, 1_000_000_000):
        path = store.write(make_snapshot(step))
    assert names(tmp_path) == ["step-100000000", "step-1000000000"]
    assert store.newest()[1] == path


def test_the_same_step_again_replaces_it_and_keeps_its_mark(store):
    store.write(make_snapshot(fill=OLD), is_best=True)
    path = store.write(make_snapshot(fill=NEW))
    assert_equal(store.read(path), make_snapshot(fill=NEW))
    assert names(store.folder) == ["best.json", "step-00000012"]
    assert store.best() == path


def test_a_run_that_goes_back_keeps_what_it_writes(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    store.write(make_snapshot(30))
    store.write(make_snapshot(10))
    store.write(make_snapshot(20))
    assert names(tmp_path) == ["step-00000020", "step-00000030"]
    (tmp_path / "step-00000030" / "rng.pt").unlink()
    snapshot, _, faults = store.newest()
    assert snapshot is not None
    assert (snapshot.step, len(faults)) == (20, 1)


def test_the_newest_of_a_run_that_goes_on_is_not_the_best(tmp_path, monkeypatch):
    """The writer prunes what was listed, and has written a newer one."""
    store, writer = CheckpointStore(tmp_path), CheckpointStore(tmp_path, keep=1)
    writer.write(make_snapshot(1), is_best=True)
    writer.write(make_snapshot(2))
    read, steps = store.read, iter((3, 4))

    def outrun(path):
        if (step := next(steps, None)) is not None:
            writer.write(make_snapshot(step))
        return read(path)

    monkeypatch.setattr(store, "read", outrun)
    snapshot, path, faults = store.newest()
    assert snapshot is not None
    assert (snapshot.step, path, faults) == (4, tmp_path / "step-00000004", [])


@pytest.mark.parametrize("moment", ["aside", "half read"])
def test_the_newest_may_be_replaced_while_it_is_read(tmp_path, monkeypatch, moment):
    store, writer = CheckpointStore(tmp_path), CheckpointStore(tmp_path)
    writer.write(make_snapshot(1))
    path = writer.write(make_snapshot(2))
    aside, read, calls = path.with_name(f".tmp-old-{path.name}"), store.read, []

    def replaced(given):
        calls.append(given)
        if len(calls) == 1 and moment == "half read":
            (given / "rng.pt").unlink()
            with pytest.raises(CheckpointError):
                read(given)
            writer.write(make_snapshot(2))
            raise CheckpointError("a file is gone")
        if len(calls) == 1:
            path.rename(aside)
        elif moment == "aside" and len(calls) == 2:
            aside.rename(path)
        return read(given)

    monkeypatch.setattr(store, "read", replaced)
    snapshot, found, faults = store.newest()
    assert snapshot is not None
    assert (snapshot.step, found, faults) == (2, path, [])
    assert calls == ([path, path] if moment == "half read" else [path, aside, path])


def test_a_mark_without_its_checkpoint_leaves_the_one_before(store):
    store.write(make_snapshot(1), is_best=True)
    before = (store.folder / "best.json").read_bytes()
    store.write(make_snapshot(2), is_best=True)
    assert before != (store.folder / "best.json").read_bytes()
    shutil.rmtree(store.folder / "step-00000002")
    assert store.best() == store.folder / "step-00000001"
    shutil.rmtree(store.folder / "step-00000001")
    assert store.best() is None


@pytest.mark.parametrize("text", ["", "[]", '{"step": "1", "before": null}', '{"step": 1}', "\xff"])
def test_a_damaged_mark_is_an_error_and_nothing_is_pruned_for_want_of_it(tmp_path, text):
    store = CheckpointStore(tmp_path, keep=1)
    store.write(make_snapshot(1), is_best=True)
    (tmp_path / "best.json").write_text(text, encoding="latin-1")
    with pytest.raises(
        CheckpointError,
        match=f"`{tmp_path}/best.json` must be as this version of syncnorm writes it",
    ):
        store.best()
    store.write(make_snapshot(2))
    store.write(make_snapshot(3))
    assert names(tmp_path) == ["best.json", *(f"step-0000000{step}" for step in (1, 2, 3))]
    path = store.write(make_snapshot(4), is_best=True)
    assert names(tmp_path) == ["best.json", "step-00000004"]
    assert store.best() == path


def test_what_else_lies_there_is_left_alone(store):
    store.write(make_snapshot(1))
    for name in ("notes", "step-1", "step-000000007", "step-00000003.bak", "step-٠٠٠٠٠٠٠٤"):
        (store.folder / name).mkdir()
    before = names(store.folder)
    store.write(make_snapshot(2))
    assert names(store.folder) == sorted([*before, "step-00000002"])
    assert store.newest()[1:] == (store.folder / "step-00000002", [])


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    store = CheckpointStore(tmp_path / "file")
    with pytest.raises(
        CheckpointError, match=f"`{tmp_path}/file` must be a folder of checkpoints: Not a directory"
    ):
        store.newest()
    with pytest.raises(FileExistsError):
        store.write(make_snapshot())


def test_a_checkpoint_may_lie_elsewhere_under_another_name(store, tmp_path):
    path = store.write(make_snapshot())
    shutil.copytree(path, tmp_path / "final")
    assert_equal(store.read(tmp_path / "final"), make_snapshot())
    shutil.copytree(path, tmp_path / "step-00000013")
    with pytest.raises(
        CheckpointError, match=r"step-00000013/manifest.json` must be of step 13, got step 12"
    ):
        store.read(tmp_path / "step-00000013")


def test_what_is_being_written_now_is_not_taken_for_a_leftover(store):
    store.write(make_snapshot(11))
    (store.folder / ".tmp-step-00000012").mkdir()
    with files.only_writer(store.folder):
        with pytest.raises(BlockingIOError, match="Somebody else is writing there"):
            store.write(make_snapshot(13))
        assert names(store.folder) == [".tmp-step-00000012", "step-00000011"]
        assert store.newest()[1:] == (store.folder / "step-00000011", [])
    store.write(make_snapshot(13))
    assert names(store.folder) == ["step-00000011", "step-00000013"]


def test_a_save_that_fails_leaves_nothing(store, monkeypatch):
    store.write(make_snapshot(12, OLD), is_best=True)

    def fail_at_the_manifest(path):
        if path.name == "manifest.json":
            raise OSError(5, "Input/output error")
        return path.open("wb")

    monkeypatch.setattr(files, "open_to_write", fail_at_the_manifest)
    with pytest.raises(OSError, match="Input/output error"):
        store.write(make_snapshot(12, NEW), is_best=True)
    assert names(store.folder) == ["best.json", "step-00000012"]
    assert_equal(store.newest()[0], make_snapshot(12, OLD))


def test_a_rename_that_fails_puts_the_old_one_back(store, monkeypatch):
    store.write(make_snapshot(12, OLD))
    rename = Path.rename

    def fail_at_the_new(path, target):
        if path.name == ".tmp-step-00000012":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_at_the_new)
    with pytest.raises(OSError, match="Input/output error"):
        store.write(make_snapshot(12, NEW))
    assert names(store.folder) == ["step-00000012"]
    assert_equal(store.newest()[0], make_snapshot(12, OLD))


def test_everything_is_brought_to_disk_before_it_gets_its_name(store, monkeypatch):
    """Files, then the folder, then the rename, then the folder above."""
    done = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor):
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def record_rename(path, target):
        done.append(f"{path.name} -> {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    store.write(make_snapshot())
    assert done == [
        store.folder.parent.name,
        *[
            "model.safetensors",
            "ema.safetensors",
            "optimizer.pt",
            "rng.pt",
            "state.json",
            "manifest.json",
        ],
        ".tmp-step-00000012",
        ".tmp-step-00000012 -> step-00000012",
        store.folder.name,
    ]
