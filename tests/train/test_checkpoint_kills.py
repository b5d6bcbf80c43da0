"""A save that is killed at any place leaves the last whole checkpoint.

A process is told where to die, in bytes or in operations on the file system, and tries to save.
"""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch

from syncnorm.train import files
from syncnorm.train.checkpoint.store import CheckpointStore
from tests.train.snapshots import NEW, OLD, assert_equal, make_snapshot, names

ROOT = Path(__file__).parents[2]
SEED = 20


class DyingFile(io.FileIO):
    """Writes so many bytes, over all files, then kills its process."""

    left = 0

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        if len(view) > DyingFile.left:
            super().write(view[: DyingFile.left])
            os.kill(os.getpid(), signal.SIGKILL)
        DyingFile.left -= len(view)
        return super().write(view)


def die_after_bytes(count: int) -> None:
    DyingFile.left = count
    files.open_to_write = lambda path: io.BufferedWriter(DyingFile(path, "wb"))


def die_before_operation(number: int) -> None:
    seen = 0

    def hook(event: str, _) -> None:
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            seen += 1
            if seen > number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


SCENARIOS = {
    # the steps before, the step that is saved, how many to keep
    "next": ([11], 12, 3),
    "same": ([12], 12, 3),
    "prune": ([10, 11], 12, 1),
}


def save(folder: Path, scenario: str) -> None:
    _, step, keep = SCENARIOS[scenario]
    CheckpointStore(folder, keep).write(make_snapshot(step, NEW), is_best=True)


def drill(root: Path) -> None:
    """Kill a save at every point of its way, and print the outcome of each.

    Runs in a process of its own.
    """
    torch.set_num_threads(1)
    os.fsync = forget
    report = []
    draw = random.Random(SEED)
    for scenario, (before, step, _) in SCENARIOS.items():
        template = root / scenario
        for each in before:
            CheckpointStore(template).write(make_snapshot(each, OLD), is_best=True)
        whole = CheckpointStore(root / f"{scenario}-whole").write(make_snapshot(step, NEW))
        total = sum(path.stat().st_size for path in whole.iterdir())
        for count in [0, *(draw.randrange(total) for _ in range(15))] if scenario == "next" else []:
            report.append(try_save(template, f"bytes-{count}", die_after_bytes, count))
        for number in range(200):
            report.append(try_save(template, f"operation-{number}", die_before_operation, number))
            if report[-1]["signal"] == 0:
                break
    print(json.dumps(report))


def try_save(template: Path, place: str, arm, argument: int) -> dict[str, object]:
    folder = template.with_name(f"{template.name}-{place}")
    shutil.copytree(template, folder)
    child = os.fork()
    if child == 0:
        arm(argument)
        save(folder, template.name)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return {
        "folder": folder.name,
        "scenario": template.name,
        "place": place,
        "signal": os.WTERMSIG(status),
    }


def forget(descriptor: int) -> None:
    """Replace `os.fsync`: the kernel's copy outlives a killed process, and the disk is slow."""


def test_a_kill_at_any_place_leaves_the_last_whole_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", forget)
    code = (
        f"import pathlib; from tests.train import {Path(__file__).stem} as t; "
        f"t.drill(pathlib.Path({str(tmp_path)!r}))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE, timeout=900
    )
    seen = Counter()
    for row in json.loads(output.stdout):
        scenario = row["scenario"]
        before, step, keep = SCENARIOS[scenario]
        store = CheckpointStore(tmp_path / row["folder"], keep)
        snapshot, path, faults = store.newest()
        assert faults == [], row
        is_new = any_equal(snapshot, make_snapshot(step, NEW))
        assert is_new or any_equal(snapshot, make_snapshot(before[-1], OLD)), row
        assert is_new or row["signal"] == signal.SIGKILL, row
        assert path is not None
        # nor is one half removed
        for each in store.folder.glob("step-*"):
            store.read(each)
        # the one marked as the best is a whole one, and not an older one than the newest
        assert store.best() == path, row
        seen[scenario, "new" if is_new else "old", path.name.startswith(".tmp-")] += 1

        # what the next one to start does
        store.write(make_snapshot(13))
        assert [name for name in names(store.folder) if name.startswith(".tmp-")] == [], row
        assert store.best() == store.folder / path.name.removeprefix(".tmp-old-"), row
        assert store.newest()[1:] == (store.folder / "step-00000013", []), row
    # kills hit before and after the moment that counts, and in the middle of replacing
    assert seen.keys() == {
        *((scenario, age, False) for scenario in SCENARIOS for age in ("old", "new")),
        ("same", "old", True),
    }
    assert seen["next", "old", False] > 16


def any_equal(left: object, right: object) -> bool:
    try:
        assert_equal(left, right)
    except AssertionError:
        return False
    return True
