"""Run the tests of CUDA and take the figures of a GPU.

    python -m benchmarks.gpu [FOLDER]

Writes gpu.json and gpu.md into FOLDER (that of the variable OUT, else build/gpu) after each part,
and prints the table at the end. Exits with 1 if a test has failed. `--device cpu --small` tries the
code where there is no GPU.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()  # before torch is imported, which may take a minute on a fresh machine

# ruff: noqa: E402
import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import part, table

ROOT = Path(__file__).parents[2]
# The most valuable part first. Seconds from the start by which each has to end: what one leaves is
# the next one's.
ENDS = {"machine": 60.0, "tests": 200.0, "step": 340.0, "primitives": 455.0, "layers": 530.0}
# A part is told to end so much earlier than it is ended.
GRACE = 8.0
FIRST_TESTS = ("layers", "alone", "no_waiting", "graphs", "modes", "nccl", "verify", "compile")
QUICK_TEST = "padding"


def test_files() -> list[str]:
    """Files with tests for CUDA, those of the kernels and layers first."""
    first = [f"tests/cuda/test_{name}.py" for name in FIRST_TESTS]
    others = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.cuda" in path.read_text()
    )
    return list(dict.fromkeys([*first, *others]))


def command(name: str, settings: part.Settings) -> list[str]:
    """The command of a part."""
    if name != "tests":
        return [sys.executable, "-m", f"benchmarks.gpu.{name}", *part.as_arguments(settings)]
    # Without the project's own options, of which some are those of plugins.
    options = ["-q", "-m", "cuda", "-o", "addopts=", "-p", "no:cacheprovider"]
    options += ["--continue-on-collection-errors", "-p", "benchmarks.gpu.outcomes"]
    some = ["-k", QUICK_TEST] if settings.is_small else []
    outcomes = ["--outcomes", str(settings.rows)]
    return [sys.executable, "-m", "pytest", *options, *outcomes, *some, *test_files()]


def run(name: str, settings: part.Settings) -> str:
    """Run a part until its end or its time is over; how it ended."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    if settings.device != "cuda":
        environment["SYNCNORM_TEST_DEVICE"] = settings.device
    with _log(settings).open("a") as output:
        process = subprocess.Popen(
            command(name, settings),
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(max(0.1, settings.left + GRACE))
        except subprocess.TimeoutExpired:
            return "cut off when its time was over"
        finally:
            # With whatever it has started, which a failure may have left.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    # Of pytest: tests have failed, or none were left.
    if status == 0 or (name == "tests" and status in (1, 5)):
        return "done"
    last = _log(settings).read_text(errors="replace").strip().splitlines()[-1:]
    return f"ended with status {status}: {' '.join(last)[:300]}"


def run_to_the_end(name: str, settings: part.Settings) -> str:
    """Run a part; go on with the tests that one which broke the process has left."""
    for path in (settings.rows, _log(settings)):
        path.write_text("")
    size, end = 0, run(name, settings)
    while name == "tests" and end.startswith("ended") and size < _size(settings):
        if settings.left <= 0.0:
            break
        size, end = _size(settings), run(name, settings)
    return end


def _log(settings: part.Settings) -> Path:
    return settings.rows.with_suffix(".log")


def _size(settings: part.Settings) -> int:
    return settings.rows.stat().st_size


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("OUT") or ROOT / "build" / "gpu"
    parser.add_argument("folder", nargs="?", type=Path, default=Path(default))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="try the code: no figures")
    parser.add_argument("--parts", nargs="+", choices=ENDS, default=list(ENDS))
    given = parser.parse_args(arguments)
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    start = BEGAN if arguments is None else time.monotonic()
    found: dict[str, Any] = {"parts": {}, "rows": {}}
    for name in given.parts:
        until = start + ENDS[name] - GRACE
        settings = part.Settings(folder / f"{name}.jsonl", until, given.device, given.small)
        found["parts"][name] = "interrupted"
        try:
            found["parts"][name] = run_to_the_end(name, settings)
        finally:
            found["rows"][name] = part.read_rows(settings.rows)
            found["seconds"] = round(time.monotonic() - start, 1)
            (folder / "gpu.json").write_text(json.dumps(found, indent=1))
            (folder / "gpu.md").write_text(table.render(found))
            said = f"{name}: {found['parts'][name]}, {found['seconds']:.0f} s from the start"
            print(said, file=sys.stderr, flush=True)
        if name == "machine" and found["parts"][name].startswith("ended"):
            break  # there is no such device
    print(table.render(found))
    return found


if __name__ == "__main__":
    # As for Ctrl-C: what was found is kept, and no part goes on alone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    found = main()
    is_bad = found["parts"].get("machine", "done") != "done" or table.bad_tests(
        found["rows"].get("tests", [])
    )
    sys.exit(bool(is_bad))
