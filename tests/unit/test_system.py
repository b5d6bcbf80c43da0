"""What only some operating systems have passes through `syncnorm.system`, and others do without."""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from syncnorm import system
from tests.launch import commands
from tests.unit import other_system

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "syncnorm"
POSIX = {*other_system.NO_MODULES, "socket.AF_UNIX"}
POSIX |= {f"os.{each}" for each in other_system.NO_POSIX}
POSIX |= {f"signal.{each}" for each in other_system.NO_SIGNALS}
LINUX = {f"os.{each}" for each in other_system.NO_LINUX}
# Where else than in `system` there is something that not all have, and why it does no harm.
ELSEWHERE = {
    "comm/shared.py": "only on Linux: `refusal` says so first",
    "native/build.py": "only compiles, where there is a compiler",
    "run/doctor.py": "looks whether a folder is there",
}
# Importable on POSIX alone, so that they may use what all of POSIX has: signals.
NEED_POSIX = ("run/", "train/", "bench/")


def uses(tree: ast.AST) -> Iterator[str]:
    """What code uses of an operating system: modules, attributes, folders, ways to start a process."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and str(node.value).startswith(
            other_system.LINUX_FOLDERS
        ):
            yield "folder"


def stray(path: str, text: str) -> set[str]:
    """Uses in a file of the package that belong into `system`."""
    if path == "system.py" or path in ELSEWHERE:
        return set()
    found = set(uses(ast.parse(text)))
    if path.startswith(NEED_POSIX):
        return found & {*LINUX, *other_system.NO_MODULES, "folder"}
    return found & {*POSIX, *LINUX, "folder"}


def test_the_system_is_asked_in_one_place():
    files = {
        path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")
    }
    assert {name: found for name, text in files.items() if (found := stray(name, text))} == {}
    assert files.keys() >= ELSEWHERE.keys()


@pytest.mark.parametrize(
    ("path", "text", "found"),
    [
        ("layers.py", "import fcntl", {"fcntl"}),
        ("layers.py", "import os\nos.fork()", {"os.fork"}),
        ("layers.py", "import signal\nsignal.SIGKILL", {"signal.SIGKILL"}),
        ("layers.py", "from signal import SIGHUP", {"signal.SIGHUP"}),
        ("run/a.py", "import signal\nsignal.SIGKILL", set()),
        ("run/a.py", "import os\nos.sched_getaffinity(0)", {"os.sched_getaffinity"}),
        ("train/a.py", "Path('/proc/self/stat')", {"folder"}),
        ("train/a.py", "import resource", {"resource"}),
        ("system.py", "import fcntl", set()),
    ],
)
def test_a_use_in_another_place_is_found(path, text, found):
    assert stray(path, text) == found


def play(name: str, folder: Path, *more: str) -> dict[str, list]:
    """What came of the uses of a process that plays a system."""
    done = commands.run(
        [sys.executable, "-m", "tests.unit.other_system", name, str(folder), *more],
        ROOT,
        {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_layers_work_on_windows_and_the_rest_says_in_a_sentence_that_it_does_not(tmp_path):
    facts = play("win32", tmp_path)
    assert facts["workers"] == [0, 0]
    assert facts["shared memory"] == "not on win32"
    rule = "needs Linux or macOS, because it locks files and stops by signals, got win32. Train"
    for what, name in {
        "fit": "syncnorm.run",
        "run": "syncnorm.run",
        "train": "syncnorm.train",
    }.items():
        kind, words = facts[what]
        assert (kind, words.partition(f" {rule}")[0]) == ("ImportError", name)
    status, words = facts["command"]
    assert status == 2
    assert words.startswith(f"syncnorm: the command {rule}")
    assert words.count("\n") == 1


def test_layers_and_the_trainer_can_be_imported_on_macos(tmp_path):
    facts = play("darwin", tmp_path)
    assert facts["workers"] == [0, 0]
    assert facts["shared memory"] == "not on darwin"
    assert [facts[each] for each in ("fit", "train", "run")] == [[0, ""]] * 3
    status, words = facts["command"]
    assert status == 2
    assert "No such option: --no-such-option" in words
    assert facts["cores"] >= 1


@pytest.mark.slow
def test_a_pool_of_ranks_works_on_windows(tmp_path):
    """Spawned, as all processes are there."""
    assert play("win32", tmp_path, "pool")["pool"] == [2, 2]


@pytest.mark.slow
def test_a_training_works_on_macos(tmp_path):
    """Each process of it plays macOS: Python imports `sitecustomize` as it starts."""
    (tmp_path / "sitecustomize.py").write_text(
        "from tests.unit.other_system import become\nbecome('darwin')\n"
    )
    done = commands.run(
        [*commands.SYNCNORM, "train", "digits", "train.epochs=1"],
        tmp_path,
        {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout


def test_this_system_knows_its_cores_and_memory():
    assert system.count_cores() > 0
    assert system.resident_memory() > 0
    assert system.peak_resident_memory() > 0
    assert system.free_memory() > 0
    assert system.refusal("the command") == ""


def test_a_lock_keeps_others_out(tmp_path):
    mine, theirs = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    try:
        system.lock(mine)
        with pytest.raises(BlockingIOError):
            system.lock(theirs)
        system.unlock(mine)
        system.lock(theirs, waits=True)
    finally:
        os.close(mine)
        os.close(theirs)
