"""Runs in a store: what is copied and when, what is fetched, and what is refused."""

import json
import os
import threading
from pathlib import Path
from unittest import mock

import fsspec
import pytest

from syncnorm.errors import ConfigError
from syncnorm.run.folder import check_resumable, make_run_folder, remove_unstarted
from syncnorm.train.checkpoint.capture import Progress
from syncnorm.train.checkpoint.store import CheckpointStore
from syncnorm.train.config.file import load_config
from syncnorm.train.loop import train
from syncnorm.train.storage import mirror as mirror_module
from syncnorm.train.storage import read_origin, write_origin
from syncnorm.train.storage.fetch import check_not_behind, local_copy
from syncnorm.train.storage.mirror import Mirror, open_mirror
from syncnorm.train.storage.remote import Remote, StorageError, within
from tests.launch.ray_cluster import wait_until
from tests.train import runs
from tests.train.snapshots import assert_equal, make_snapshot, names

URL = "memory://bucket/runs/mine"
SHORT = ["train.epochs=2", "train.global_batch=500", "run_dir=memory://bucket/runs"]


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """An empty store, and an empty working folder."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    monkeypatch.chdir(tmp_path)
    yield files
    files.store.clear()


@pytest.fixture
def writes(memory, monkeypatch):
    """The names that are written to the store, in their order."""
    written = []
    for method in ("write", "upload"):
        real = getattr(Remote, method)

        def telling(self, *arguments, real=real, method=method):
            written.append(arguments[0] if method == "write" else arguments[1])
            return real(self, *arguments)

        monkeypatch.setattr(Remote, method, telling)
    return written


def make_run(root: Path, *steps: int, best: int | None = None, keep: int = 3) -> Path:
    """A folder of a run with a checkpoint of each step."""
    folder = root / "here" / "mine"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("model: {}\n")
    (folder / "metrics.jsonl").write_text('{"event":"start"}\n{"torn')
    for step in steps:
        store = CheckpointStore(folder / "checkpoints", keep)
        store.write(make_snapshot(step), is_best=step == best)
    return folder


def copy(folder: Path, keep: int = 3, url: str = URL) -> list[str]:
    """Copy a folder once; the faults."""
    mirror = Mirror(folder, url, keep)
    mirror.close()
    assert mirror.is_over(60)
    return mirror.pop_faults()


def steps_there(memory) -> list[int]:
    paths = memory.glob("/bucket/runs/mine/checkpoints/step-*/manifest.json")
    return sorted(int(path.split("/")[-2][5:]) for path in paths)


def test_the_order_is_record_mark_files_manifest_end(tmp_path, writes):
    folder = make_run(tmp_path, 2, best=2)
    (folder / "exit.json").write_text("{}")
    assert copy(folder) == []
    assert writes == [
        "config.yaml",
        "metrics.jsonl",
        "checkpoints/best.json",
        *(
            f"checkpoints/step-00000002/{name}"
            for name in sorted(names(folder / "checkpoints/step-00000002"))
            if name != "manifest.json"
        ),
        "checkpoints/step-00000002/manifest.json",
        "exit.json",
    ]
    assert Remote(URL).read("metrics.jsonl") == b'{"event":"start"}\n'
    writes.clear()
    assert copy(folder) == []
    assert writes == ["config.yaml", "metrics.jsonl", "checkpoints/best.json", "exit.json"]


def test_the_best_checkpoint_goes_before_newer_ones(tmp_path, writes):
    assert copy(make_run(tmp_path, 2, 4, 6, best=4)) == []
    manifests = [name[17:25] for name in writes if name.endswith("manifest.json")]
    assert manifests == ["00000004", "00000006", "00000002"]


def test_old_checkpoints_are_removed_as_keep_says_and_later_ones_never(tmp_path, memory):
    folder = make_run(tmp_path, 2, 4, 6, best=2)
    assert copy(folder) == []
    assert steps_there(memory) == [2, 4, 6]
    memory.rm("/bucket/runs/mine/checkpoints/step-00000004/manifest.json")
    memory.pipe("/bucket/runs/mine/checkpoints/step-00000099/manifest.json", b"later")
    make_run(tmp_path, 8, 10, keep=2)
    assert copy(folder, keep=2) == []
    assert steps_there(memory) == [2, 8, 10, 99]
    assert not memory.exists("/bucket/runs/mine/checkpoints/step-00000004/model.safetensors")


def test_one_of_the_same_step_is_replaced_with_its_manifest_first_gone(tmp_path, memory, writes):
    folder = make_run(tmp_path, 2)
    copy(folder)
    other = make_snapshot(2, fill=1.0)
    CheckpointStore(folder / "checkpoints").write(other)
    memory.pipe("/bucket/runs/mine/checkpoints/step-00000002/extra.pt", b"from before")
    writes.clear()
    assert copy(folder) == []
    assert writes[-1] == "checkpoints/step-00000002/manifest.json"
    snapshot, _, faults = CheckpointStore(local_copy(URL) / "checkpoints").newest()
    assert faults == []
    assert_equal(snapshot, other)


def test_a_copy_is_the_run(tmp_path, memory):
    folder = make_run(tmp_path, 2, 4, 6, best=2)
    (folder / "loggers.json").write_text("{}")
    copy(folder)
    there = local_copy(URL + "/")
    assert there == Path("runs/mine")
    store, mine = (CheckpointStore(each / "checkpoints") for each in (there, folder))
    assert_equal(store.newest()[0], mine.newest()[0])
    best = store.best()
    assert best is not None
    assert best.name == "step-00000002"
    assert sorted(store.folders()) == [2, 6], "the newest and the best"
    for name in ("config.yaml", "loggers.json"):
        assert (there / name).read_bytes() == (folder / name).read_bytes()
    assert read_origin(there) == URL
    assert not list(there.rglob(".tmp-*"))


def test_a_folder_is_its_own_copy(tmp_path):
    assert local_copy(str(tmp_path)) == tmp_path


def test_half_and_damaged_checkpoints_are_passed_over(tmp_path, memory, caplog):
    folder = make_run(tmp_path, 2, 4, 6)
    copy(folder)
    root = "/bucket/runs/mine/checkpoints"
    memory.rm(f"{root}/step-00000006/manifest.json")
    memory.pipe(f"{root}/step-00000004/model.safetensors", b"something else")
    memory.copy(f"{root}/step-00000002", f"{root}/step-00000003", recursive=True)
    there = local_copy(URL)
    assert sorted(CheckpointStore(there / "checkpoints").folders()) == [2]
    assert "checkpoint of step 4 passed over" in caplog.text
    assert "checkpoint of step 3 passed over" in caplog.text, "its manifest is of step 2"
    assert not list(there.rglob(".tmp-*"))


def test_names_of_a_store_stay_in_the_runs_folder(tmp_path, memory):
    copy(make_run(tmp_path, 2))
    checkpoint = "/bucket/runs/mine/checkpoints/step-00000002"
    # A mapping, which takes any key: some stores do.
    for name in ("/../../../../out.pt", "/..", "/Upper.pt", "/.hidden.pt", "/a/b.pt", "/run.sh"):
        memory.store[checkpoint + name] = memory.store[f"{checkpoint}/manifest.json"]
    memory.store["/bucket/runs/mine/../evil.yaml"] = memory.store[f"{checkpoint}/manifest.json"]
    memory.store["/bucket/runs/mine/storage.json"] = memory.store[f"{checkpoint}/manifest.json"]
    there = local_copy(URL)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.pt"))
    assert not [path for path in found if not path.startswith(("runs/mine/", "here/mine/"))]
    assert names(there / "checkpoints/step-00000002") == names(
        tmp_path / "here/mine/checkpoints/step-00000002"
    )
    assert not list(tmp_path.rglob("evil.yaml"))
    assert read_origin(there) == URL


def test_a_run_that_got_further_here_is_left_as_it_is(tmp_path, memory):
    folder = make_run(tmp_path, 2)
    copy(folder)
    there = local_copy(URL)
    CheckpointStore(there / "checkpoints").write(make_snapshot(4))
    (there / "metrics.jsonl").write_text("longer")
    assert local_copy(URL) == there
    assert (there / "metrics.jsonl").read_text() == "longer"
    make_run(tmp_path, 6)
    copy(folder)
    local_copy(URL)
    assert sorted(CheckpointStore(there / "checkpoints").folders()) == [2, 4, 6]
    assert (there / "metrics.jsonl").read_text() != "longer"


def test_a_folder_that_was_overtaken_by_its_copy_is_not_gone_on_with(tmp_path, memory, caplog):
    """Another machine went on from the address: its record and configuration stay there."""
    folder = make_run(tmp_path, 2)
    copy(folder)
    here = local_copy(URL)
    check_not_behind(here)
    make_run(tmp_path, 4)
    copy(folder)
    with pytest.raises(ConfigError, match=f"step 2, its copy in the store step 4.*{URL}"):
        check_not_behind(here)
    CheckpointStore(here / "checkpoints").write(make_snapshot(4))
    check_not_behind(here)
    check_not_behind(folder)  # has no address
    # What is damaged there is not fetched, though the record up to it is.
    (folder / "metrics.jsonl").write_text('{"event": "step", "step": 6}\n')
    CheckpointStore(folder / "checkpoints").write(make_snapshot(6))
    copy(folder)
    memory.pipe("/bucket/runs/mine/checkpoints/step-00000006/model.safetensors", b"torn")
    check_not_behind(local_copy(URL))
    memory.store.clear()
    check_not_behind(here)
    with mock.patch.object(Remote, "sizes", side_effect=ConfigError("no answer")):
        check_not_behind(here)
    assert "no answer" in caplog.text


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://bucket/runs/other", "there is no run at memory://bucket/runs/other"),
        ("memory://bucket/runs/.hidden", "must end with its name"),
        ("memory://bucket/../mine", "must be a path or an address"),
        ("s3://me:secret@bucket/mine", "must hold no name and no password"),
        ("nowhere://bucket/mine", "cannot be opened: ValueError: Protocol not known: nowhere"),
    ],
)
def test_an_address_without_a_run_is_one_line(url, message, memory, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        local_copy(url)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_missing_package_is_named(memory, monkeypatch):
    import fsspec.core

    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ConfigError, match="not installed: Install s3fs to access S3"):
        local_copy("s3://bucket/runs/mine")


def test_another_runs_folder_is_in_the_way(tmp_path, memory):
    copy(make_run(tmp_path, 2))
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").touch()
    with pytest.raises(ConfigError, match="is in the way of a copy of memory://"):
        local_copy(URL)


def test_a_failed_copy_is_a_fault_and_tried_again(tmp_path, memory, monkeypatch):
    folder = make_run(tmp_path, 2)
    real, failed = Remote.upload, threading.Event()

    def fail_once(self, *arguments):
        if not failed.is_set():
            failed.set()
            raise StorageError("the network is gone")
        return real(self, *arguments)

    monkeypatch.setattr(Remote, "upload", fail_once)
    mirror = Mirror(folder, URL, 3)
    mirror.request()
    assert failed.wait(60)
    mirror.request()  # with the next save
    mirror.close()
    assert mirror.is_over(60)
    assert mirror.pop_faults() == [
        f"{folder} is not copied: the network is gone; the next save tries again"
    ]
    assert steps_there(memory) == [2]


def test_what_somebody_removes_there_is_copied_again(tmp_path, memory):
    mirror = Mirror(make_run(tmp_path, 2, best=2), URL, 3)
    mirror.request()
    wait_until(lambda: steps_there(memory) == [2])
    before = sorted(memory.find("/bucket/runs/mine"))
    memory.rm("/bucket/runs/mine", recursive=True)
    mirror.close()
    assert mirror.is_over(60)
    assert mirror.pop_faults() == []
    assert before
    assert sorted(memory.find("/bucket/runs/mine")) == before


def test_a_store_that_stays_away_is_told_of_once_and_at_the_end(tmp_path, memory, monkeypatch):
    tried = threading.Semaphore(0)

    def fail(self):
        tried.release()
        raise StorageError("the network is gone")

    monkeypatch.setattr(Remote, "sizes", fail)
    monkeypatch.setattr(mirror_module, "_PAUSE_SECONDS", 0.0)
    mirror = Mirror(make_run(tmp_path, 2), URL, 3)
    for _ in range(3):
        mirror.request()
        assert tried.acquire(timeout=60)
    mirror.close()
    assert mirror.is_over(60)
    first, last = mirror.pop_faults()
    assert first.endswith("is gone; the next save tries again")
    assert last.endswith("is gone; what is here is whole")


def test_a_copy_that_does_not_move_is_given_up(tmp_path, memory, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(Remote, "sizes", lambda self: go.wait(60) and {})
    mirror = Mirror(make_run(tmp_path, 2), URL, 3, patience_seconds=0.05)
    mirror.close()
    deadline = threading.Event()
    while not mirror.is_over(0.05):
        assert not deadline.wait(0)
    (fault,) = mirror.pop_faults()
    assert fault.endswith("nothing has moved for 0.05 seconds; what is here is whole")
    go.set()


def test_a_store_that_does_not_answer_or_refuses_is_one_line():
    go = threading.Event()
    with pytest.raises(ConfigError, match=r"no answer from s3://bucket within 0\.05 seconds"):
        within(0.05, lambda: go.wait(60), "s3://bucket")
    go.set()

    def refuse():
        raise StorageError("cannot write config.yaml to s3://bucket: PermissionError: Forbidden")

    with pytest.raises(ConfigError, match=r"PermissionError: Forbidden\. The place must be there"):
        within(60, refuse, "s3://bucket")


def test_a_run_that_never_began_leaves_nothing_there(tmp_path, memory):
    config = load_config("digits", [*SHORT, "name=mine"])
    folder = make_run_folder(config, "digits", launch="id")
    assert folder.parent == Path("runs")
    assert folder.name.startswith("mine-")
    assert read_origin(folder) == f"memory://bucket/runs/{folder.name}"
    assert memory.find("/bucket") == [f"/bucket/runs/{folder.name}/config.yaml"]
    remove_unstarted(folder)
    assert memory.find("/bucket") == []
    assert not list((tmp_path / "runs").iterdir())


def train_on(folder: Path, config, stop_at: int | None = None) -> None:
    progress, mirror = Progress(), open_mirror(folder, 3, 60)
    watch = runs.Free(stop_at, progress)
    train(config, runs.workers(), folder, progress, watch, ("tests",), mirror=mirror)
    if mirror is not None:
        mirror.close()
        assert mirror.is_over(60)
        assert mirror.pop_faults() == []


def resume_from_memory(root: str) -> tuple[str, str]:
    """Train alone; and with a stop and a resume from the store in an empty folder."""
    os.chdir(root)
    fsspec.filesystem("memory").store.clear()
    config = load_config("digits", SHORT)
    digests = []
    for stop_at in (None, 3):
        folder = make_run_folder(config, "digits")
        train_on(folder, config, stop_at)
        url = read_origin(folder)
        assert url is not None
        behind = folder.absolute()
        empty = Path(root) / f"empty-{stop_at}"
        empty.mkdir()
        os.chdir(empty)
        folder = check_resumable(config, url)
        train_on(folder, config)
        (end,) = runs.events(folder, "end")[-1:]
        digests.append(json.dumps([end["digests"], end["test_loss"], end["step"]]))
        steps = [event["step"] for event in runs.events(folder, "step")]
        assert steps == [1, 2, 3, 4, 5, 6], "the record came along"
        if stop_at is not None:
            with pytest.raises(ConfigError, match="`--resume` must name what got furthest"):
                check_resumable(config, behind)
    return digests[0], digests[1]


def test_a_run_goes_on_from_the_store_with_the_same_bits(pool, tmp_path):
    ((alone, resumed),) = pool(1).run(resume_from_memory, str(tmp_path))
    assert alone == resumed


def test_an_origin_is_the_address_of_this_run(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    assert read_origin(folder) is None
    write_origin(folder, URL)
    assert read_origin(folder) == URL
    # A copy of the folder would replace the run in the store; somebody else's might do worse.
    for text in (
        *("[]", "{", '{"url": 3}', '{"url": "memory://bucket/runs/other"}'),
        *('{"url": "file:///tmp/mine"}', '{"url": "memory://me:word@bucket/mine"}'),
    ):
        (folder / "storage.json").write_text(text)
        with pytest.raises(ConfigError, match="must hold the address of a run called 'mine'"):
            read_origin(folder)
