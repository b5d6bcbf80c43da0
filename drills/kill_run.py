"""A run of the command that is killed from outside and from inside, for `drills.kill_drill`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from drills import kill_worker
from drills.kill_evidence import Evidence, gather, kill, left_behind, processes
from drills.kill_worker import Torn, read_deaths, write_plan

ROOT = Path(__file__).parents[1]
STEPS = 32  # 1293 samples in 4 epochs, each of 7 steps of 180 and one of 33
OPTIONS = [
    *("train.epochs=4", "train.global_batch=180", "train.lr=0.2", "train.clip=1", "train.ema=0.9"),
    *(
        "norm.name=sync_batch_renorm",
        "data.augment.crop=1",
        "data.augment.flip=true",
        "data.augment.cutout=2",
        "data.validation=0.1",
    ),
    *("checkpoint.every=2", "follow.every=5", "launch.device=cpu", "launch.restarts=1000"),
]
# The same digits, read by processes of each worker, one at a time and changed at random.
LOADED = [
    f"data.name={kill_worker.__name__}:{kill_worker.digit_samples.__name__}",
    *("data.augment.crop=0", "data.augment.flip=false", "data.augment.cutout=0"),
    "data.loader.workers=1",
]
# Their model, which makes workers die.
NET = f"{kill_worker.__name__}:{kill_worker.net.__name__}"
# In the environment of every process of a run, to find them all by.
_MARK = "SYNCNORM_DRILL"
_POLL_SECONDS = 0.02
# For so long a run may show no sign of life: twice as long as the trainer's own limits, at least.
_SILENCE_SECONDS = 200.0
# A worker that is still importing notices only then that its launcher is gone.
_GRACE_SECONDS = 20.0


class Kill(NamedTuple):
    """A kill from outside.

    Args:
        step: when this is on record of workers that have started since the kill before.
        victim: number of the worker; None: the launcher.
        is_early: not then, but on the way there, while what was killed before is being started
            again.
        moment: 0 to 1, of the time that a step, or a start, takes.
    """

    step: int
    victim: int | None
    is_early: bool
    moment: float


class Pace(NamedTuple):
    """The durations of a start and of a step, in seconds."""

    start: float
    step: float


class Fault(NamedTuple):
    """A fault that has come, and when, in seconds since 1970."""

    kind: str
    time: float


@dataclass
class Result:
    """The outcome of a run.

    Args:
        faults: those that have come.
        kills: how many of them were from outside.
        starts: when workers began, or went on, to train, in seconds since 1970.
        launches: how often the command was given.
        problems: what there must not be.
        began: in seconds since 1970.
        seconds: of the whole run.
        evidence: what it has come to; None if nothing.
    """

    faults: list[Fault] = field(default_factory=list)
    kills: int = 0
    starts: list[float] = field(default_factory=list)
    launches: int = 0
    problems: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.time)
    seconds: float = 0.0
    evidence: Evidence | None = None


class Run:
    """A run of the command in a folder of its own.

    Args:
        folder: is made.
        workers: how many.
        torn: the deaths of its first worker to come.
        loads: True if each worker has a process that loads its samples.
    """

    def __init__(self, folder: Path, workers: int, torn: Sequence[Torn], loads: bool) -> None:
        folder.mkdir()
        self.folder = folder
        self.plan = folder / "plan.json"
        self.launches = 0
        self._workers, self._loads = workers, loads
        self._process: subprocess.Popen[bytes] | None = None
        write_plan(self.plan, list(torn))
        (folder / "tmp").mkdir()

    def launch(self) -> None:
        """Give the command, to go on with what there is."""
        resume = [] if self.record is None else ["--resume", str(self.record)]
        model = [f"model.name={NET}", "--allow", NET.partition(":")[0]]
        options = [
            *OPTIONS,
            *(LOADED if self._loads else []),
            *model,
            f"launch.workers={self._workers}",
            *resume,
        ]
        with (self.folder / "stderr.txt").open("ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "syncnorm", "train", "digits", *options],
                cwd=self.folder,
                env={name: value for name, value in os.environ.items() if name != "RANK"}
                | self._variables(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
        self.launches += 1

    def _variables(self) -> dict[str, str]:
        drill = {_MARK: str(self.folder), kill_worker.PLAN: str(self.plan)}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**drill, "PYTHONPATH": path, "TMPDIR": str(self.folder / "tmp")}

    @property
    def record(self) -> Path | None:
        """The run's own folder, once it has a configuration: without one it has not begun."""
        return next((path.parent for path in self.folder.glob("runs/*/config.yaml")), None)

    @property
    def status(self) -> int | None:
        """Exit status of the command; None while it goes on."""
        assert self._process is not None
        return self._process.poll()

    def pid(self, victim: int | None) -> int | None:
        """The launcher, or its present worker of that number; None if there is none just now."""
        assert self._process is not None
        if victim is None:
            return self._process.pid
        path = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                if Path(f"/proc/{child}/comm").read_text().strip() == f"syncnorm-{victim}":
                    return child
        return None

    def kill_launcher(self) -> None:
        """Kill it, and give the command again at once."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self.launch()

    def events(self, since: int = 0) -> tuple[list[dict[str, Any]], int]:
        """The complete lines on record from this byte on, and the size of the record in bytes."""
        with contextlib.suppress(StopIteration, OSError):
            with next(self.folder.glob("runs/*/metrics.jsonl")).open("rb") as file:
                file.seek(since)
                data = file.read()
            lines = data.split(b"\n")[:-1]
            return [json.loads(line) for line in lines if line.endswith(b"}")], since + len(data)
        return [], since

    def wait(self, is_over: Callable[[], bool]) -> bool:
        """Wait for something, or for the end; False if the run shows no sign of life meanwhile."""
        signs, deadline = self._signs(), time.monotonic() + _SILENCE_SECONDS
        while not is_over() and self.status is None:
            if signs != self._signs():
                signs, deadline = self._signs(), time.monotonic() + _SILENCE_SECONDS
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def _signs(self) -> list[int]:
        """The sizes that grow while the run is alive."""
        files = [
            self.folder / "stderr.txt",
            *self.folder.glob("*.deaths"),
            *self.folder.glob("runs/*/metrics.jsonl"),
        ]
        return [path.stat().st_size for path in files]

    def left(self) -> list[int]:
        """The processes that this run has."""
        return processes(_MARK, str(self.folder))

    def problems(self) -> list[str]:
        """The problems after the end: processes, files and locks left."""
        found = [f"left behind: process {pid}" for pid in self.left()]
        if self.status != 0:
            said = (self.folder / "stderr.txt").read_text(encoding="utf-8", errors="replace")
            found.append(f"exit status {self.status}: {said[-600:].strip()}")
        # A launcher that is killed outright cannot remove its temporary folder.
        if self.launches == 1:
            found += [f"left behind: {path}" for path in (self.folder / "tmp").glob("syncnorm-*")]
        return found if self.record is None else [*found, *left_behind(self.record)]


def run_once(
    folder: Path,
    workers: int,
    pace: Pace,
    kills: Sequence[Kill],
    torn: Sequence[Torn],
    loads: bool = False,
) -> Result:
    """Run to the end, with those of the faults that come before it.

    Args:
        folder: is made.
        workers: how many.
        pace: of the run that was left alone.
        kills: in the order of their steps.
        torn: in the order of their steps.
        loads: True if each worker has a process that loads its samples.
    """
    run, result, began = Run(folder, workers, torn, loads), Result(), time.monotonic()
    run.launch()
    try:
        for each in kills:
            kind = _strike(run, each, pace)
            if kind is None:
                break
            result.faults.append(Fault(kind, time.time()))
        run.wait(lambda: False)
        deadline = time.monotonic() + _GRACE_SECONDS
        while run.left() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        result.problems += run.problems()
    finally:
        kill(run.left())
    result.kills = len(result.faults)
    result.faults += [
        Fault(f"save torn {death['place']}", death["time"]) for death in read_deaths(run.plan)
    ]
    result.starts = [event["time"] for event in run.events()[0] if event["event"] == "start"]
    result.launches, result.seconds = run.launches, time.monotonic() - began
    if run.record is not None:
        result.evidence, problems = gather(run.record)
        result.problems += problems
    return result


def _strike(run: Run, each: Kill, pace: Pace) -> str | None:
    """Wait for the moment and kill; None if the run ends before."""
    (_, since), now = run.events(), time.monotonic()
    if each.is_early:
        is_alive = run.wait(lambda: time.monotonic() > now + each.moment * pace.start)
    else:
        is_alive = run.wait(lambda: _has_come(run.events(since)[0], each.step))
        time.sleep(each.moment * pace.step)
    if not is_alive or not run.wait(lambda: run.pid(each.victim) is not None):
        return None
    pid = run.pid(each.victim)
    if run.status is not None or pid is None:
        return None
    place = "in training" if _has_come(run.events(since)[0], 0) else "on the way there"
    if each.victim is None:
        run.kill_launcher()
        return f"launcher killed {place}"
    kill([pid])
    return f"worker killed {place}"


def _has_come(events: list[dict[str, Any]], step: int) -> bool:
    """True if so late a step is on record of workers that have started meanwhile."""
    kinds = [event["event"] for event in events]
    if "start" not in kinds:
        return False
    return any(
        event["event"] == "step" and event["step"] >= step
        for event in events[kinds.index("start") :]
    )
