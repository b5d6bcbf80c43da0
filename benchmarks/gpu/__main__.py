"""Run the tests of CUDA and take the figures of a GPU.

    python -m benchmarks.gpu [FOLDER]

Writes gpu.json and gpu.md into FOLDER (that of the variable OUT, else build/gpu) every few seconds,
and prints the table at the end. gpu.json has all rows, and the end of what each process has said.
Exits with 1 if a test has failed or there was no time for it. `--parts machine tests` leaves all of
the time to the tests. `--device cpu --small` tries the code where there is no GPU.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()  # before torch is imported, which may take a minute on a fresh machine

# ruff: noqa: E402
import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import part, table
from syncnorm.train.files import write_text_whole

ROOT = Path(__file__).parents[2]
# The most valuable part first. Seconds from the start by which each has to end: what one leaves is
# the next one's.
ENDS = {"machine": 110.0, "tests": 200.0, "step": 340.0, "primitives": 455.0, "layers": 530.0}
# A part is told to end so much earlier than it is ended.
GRACE = 8.0
# What is found is written down so often, for a run that is killed.
KEPT_EVERY_SECONDS = 5.0
LOG_CHARACTERS = 20_000
CUT_OFF = "cut off when its time was over"
# They run side by side: most of their time is the host's, which compiles kernels.
TEST_GROUPS = (
    ("layers",),
    ("alone", "no_waiting"),
    ("graphs", "modes", "nccl"),
    ("verify",),
    # A test of these takes the compiler's quarter of a minute.
    ("compile",),
    ("compile_ranks",),
    ("compile_models",),
)
QUICK_TEST = "padding"


def test_groups() -> list[list[str]]:
    """Files with tests for CUDA, by the process that runs them."""
    groups = [[f"tests/cuda/test_{name}.py" for name in names] for names in TEST_GROUPS]
    named = {name for group in groups for name in group}
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.cuda" in path.read_text()
    }
    groups[-1] += sorted(found - named)
    return groups


def test_files() -> list[str]:
    """Files with tests for CUDA, those of the kernels and layers first."""
    return [name for group in test_groups() for name in group]


@dataclass
class Job:
    """A process of a part, and those that go on after it where a test breaks it.

    Args:
        command: what it runs, settings included.
        settings: with rows of its own.
        is_pytest: whether it is pytest, which may be started again.
    """

    command: list[str]
    settings: part.Settings
    is_pytest: bool = False
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    end: str | None = field(default=None, init=False)
    """How it ended; None while it runs."""
    _size: int = field(default=0, init=False)

    @property
    def log(self) -> Path:
        return self.settings.rows.with_suffix(".log")

    def clear(self) -> None:
        """Empty its files of an earlier run."""
        for path in (self.settings.rows, self.log):
            path.write_text("")

    def start(self) -> None:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        # As many processes as there are cores, in each rank of each test, would be too many.
        environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
        if self.settings.device != "cuda":
            environment["SYNCNORM_TEST_DEVICE"] = self.settings.device
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def look(self) -> None:
        """Note how it ended, if it has; start it again after a test that broke the process."""
        assert self.process is not None
        status = self.process.poll()
        if status is None and self.settings.left + GRACE > 0.0:
            return
        self.kill()
        self.end = self._ended(status)
        size = self.settings.rows.stat().st_size
        has_broken = self.is_pytest and self.end.startswith("ended") and size > self._size
        if has_broken and self.settings.left > 0.0:
            self._size, self.end = size, None
            self.start()

    def kill(self) -> None:
        """End it, with whatever it has started, which a failure may have left."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _ended(self, status: int | None) -> str:
        """How it ended, by its exit status; None: its time was over."""
        last = (part.read_rows(self.settings.rows) or [{}])[-1]
        if "ended" in last:  # pytest, by itself, whatever the tests' outcomes
            return CUT_OFF if last["ended"] == "early" else "done"
        if status is None:
            if last.get("outcome") == "not finished":
                self.settings.write(**{**last, "outcome": "cut off"})
            return CUT_OFF
        if status == 0 and not self.is_pytest:
            return "done"
        said = self.log.read_text(errors="replace").strip().splitlines()[-1:]
        return f"ended with status {status}: {' '.join(said)[:300]}"


def jobs(name: str, settings: part.Settings) -> list[Job]:
    """The processes of a part."""
    if name != "tests":
        command = [sys.executable, "-m", f"benchmarks.gpu.{name}"]
        return [Job([*command, *part.as_arguments(settings)], settings)]
    # Without the project's own options, of which some are those of plugins.
    options = ["-q", "-m", "cuda", "-o", "addopts=", "-p", "no:cacheprovider"]
    options += ["--continue-on-collection-errors", "-p", "benchmarks.gpu.outcomes"]
    if settings.is_small:
        options += ["-k", QUICK_TEST]
    found = []
    for names in [test_files()] if settings.is_small else test_groups():
        rows = settings.rows.with_stem(f"tests-{Path(names[0]).stem.removeprefix('test_')}")
        own = replace(settings, rows=rows)
        given = f"--settings={shlex.join(part.as_arguments(own))}"
        command = [sys.executable, "-m", "pytest", *options, given, *names]
        found.append(Job(command, own, is_pytest=True))
    return found


def run(running: Sequence[Job], keep: Callable[[], None] = lambda: None) -> str:
    """Run the processes of a part until their end or their time is over; how they ended.

    Args:
        running: the processes.
        keep: called every few seconds.
    """
    kept = time.monotonic()
    try:
        for job in running:
            job.clear()
            job.start()
        while any(job.end is None for job in running):
            time.sleep(0.05)
            for job in running:
                if job.end is None:
                    job.look()
            if time.monotonic() - kept > KEPT_EVERY_SECONDS:
                with contextlib.suppress(OSError):  # it is tried again
                    keep()
                kept = time.monotonic()
    finally:
        for job in running:
            if job.end is None:
                job.kill()
    ends = dict.fromkeys(job.end for job in running if job.end not in (None, "done"))
    return "; ".join(map(str, ends)) or "done"


@dataclass
class Found:
    """What has been found so far."""

    folder: Path
    start: float
    content: dict[str, Any] = field(
        default_factory=lambda: {"parts": {}, "rows": {}, "logs": {}, "seconds": 0.0}
    )

    def keep(self, name: str, running: Sequence[Job]) -> None:
        """Write it down, with what a part has found until now."""
        self.content["rows"][name] = [
            r for job in running for r in part.read_rows(job.settings.rows)
        ]
        logs = {job.log.stem: job.log for job in running if job.log.exists()}
        self.content["logs"] |= {
            name: log.read_text(errors="replace")[-LOG_CHARACTERS:] for name, log in logs.items()
        }
        self.content["seconds"] = round(time.monotonic() - self.start, 1)
        write_text_whole(self.folder / "gpu.json", json.dumps(self.content, indent=1))
        write_text_whole(self.folder / "gpu.md", table.render(self.content))


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
    found = Found(folder, BEGAN if arguments is None else time.monotonic())
    with tempfile.TemporaryDirectory(prefix="syncnorm-gpu-", ignore_cleanup_errors=True) as work:
        for name in given.parts:
            # The last has what the others leave.
            end = max(ENDS.values()) if name == given.parts[-1] else ENDS[name]
            until = found.start + end - GRACE
            rows = Path(work) / f"{name}.jsonl"
            running = jobs(name, part.Settings(rows, until, given.device, given.small))
            ends = found.content["parts"]
            ends[name] = "interrupted"
            keep = partial(found.keep, name, running)
            try:
                ends[name] = run(running, keep)
            finally:
                keep()
                said = f"{name}: {ends[name]}, {found.content['seconds']:.0f} s from the start"
                print(said, file=sys.stderr, flush=True)
            if name == "machine" and ends[name].startswith("ended"):
                break  # there is no such device
    print(table.render(found.content))
    return found.content


if __name__ == "__main__":
    # As for Ctrl-C: what was found is kept, and no part goes on alone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    found = main()
    ends = [found["parts"].get(name, "done") for name in ("machine", "tests")]
    bad = table.bad_tests(found["rows"].get("tests", []))
    sys.exit(bool(bad) or any(end != "done" for end in ends))
