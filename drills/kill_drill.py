"""Runs that are killed again and again, which must end with the bits of one that is not.

    python -m drills.kill_drill [--workers 2 3] [--kills 30] [--torn 30] [--seed 0] [--loader]

For each number of workers one run is left alone. The others are killed from outside, a worker or
the launcher, at moments drawn by the seed, and from inside, at a byte or an operation of a save
(`drills.kill_worker`). Each must end with the same SHA-256 over weights, buffers, averages,
optimizer, schedule, random numbers and position, and with the same record of every step and epoch;
and leave no process, no `.tmp-` name and no lock. Else the exit status is 1.

A fault is a SIGKILL: the process is gone, and the system still writes what it was handed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from drills.kill_evidence import Evidence
from drills.kill_run import STEPS, Fault, Kill, Pace, Result, run_once
from drills.kill_worker import Torn

# Of each sort in one run: starting workers takes most of the time, and a run has 16 saves.
_FAULTS_PER_RUN = 10
# Of a save: its folder, seven files, its name, and the first of those that remove an older one.
_OPERATIONS = 15


def draw_kills(draw: random.Random, workers: int, count: int) -> list[Kill]:
    """Half of them while something starts, a fifth of the launcher."""
    return [
        Kill(
            step=draw.randint(1, STEPS),
            victim=None if number % 5 == 2 else draw.randrange(workers),
            is_early=number % 2 == 1,
            moment=draw.random(),
        )
        for number in range(count)
    ]


def draw_torn(draw: random.Random, save_bytes: int, count: int) -> list[Torn]:
    """Half of them at a byte, half at an operation.

    A fifth is in the last save, which no later one cleans up after.
    """
    operations = draw.sample(range(_OPERATIONS), _OPERATIONS)
    return [
        Torn(
            step=STEPS if number % 5 == 4 else draw.randint(1, STEPS),
            after=draw.randrange(save_bytes)
            if number % 2
            else operations[number // 2 % _OPERATIONS],
            is_bytes=number % 2 == 1,
        )
        for number in range(count)
    ]


def drill(
    root: Path, workers: int, kills: int, torn: int, seed: int, loads: bool = False
) -> Iterator[Result]:
    """Drill on so many workers.

    Args:
        root: an existing folder for what the runs write.
        workers: in each run.
        kills: from outside.
        torn: saves.
        seed: of all that is drawn.
        loads: True if each worker has a process that loads its samples.

    Returns:
        What became of each run; the first is the one that is left alone.
    """
    alone = run_once(root / f"{workers}-alone", workers, Pace(0.0, 0.0), [], [], loads)
    yield alone
    if alone.problems or alone.evidence is None:
        return
    draw = random.Random(f"{seed} on {workers}")
    to_kill = draw_kills(draw, workers, kills)
    to_tear = draw_torn(draw, alone.evidence.save_bytes, torn)
    start = alone.starts[0] - alone.began
    pace = Pace(start, (alone.seconds - start) / STEPS)
    # Those that come too late for their run are left for the next; but not for ever.
    for number in range(1 + 2 * -(-max(kills, torn) // _FAULTS_PER_RUN)):
        if not to_kill and not to_tear:
            return
        now = sorted(to_kill[:_FAULTS_PER_RUN], key=lambda each: each.step)
        saves = sorted(to_tear[:_FAULTS_PER_RUN], key=lambda each: each.step)
        result = run_once(root / f"{workers}-{number}", workers, pace, now, saves, loads)
        to_kill = now[result.kills :] + to_kill[_FAULTS_PER_RUN:]
        to_tear = saves[len(result.faults) - result.kills :] + to_tear[_FAULTS_PER_RUN:]
        result.problems += differences(alone.evidence, result.evidence)
        yield result
    if to_kill or to_tear:
        yield Result(
            problems=[f"{len(to_kill) + len(to_tear)} faults that were planned did not come"]
        )


def differences(expected: Evidence, got: Evidence | None) -> list[str]:
    """Compare a run with the one left alone."""
    if got is None:
        return ["it has not begun"]
    found = []
    if got.digest != expected.digest:
        found.append(f"the last checkpoint has the SHA-256 {got.digest}, not {expected.digest}")
    steps = [name for name, values in expected.curve.items() if got.curve.get(name) != values]
    if steps or got.curve.keys() != expected.curve.keys():
        found.append(
            f"{len(steps)} records differ or lack, {len(got.curve)} there are: "
            f"{', '.join(steps[:3])}"
        )
    if got.best != expected.best:
        found.append(f"the best checkpoint is {got.best}, not {expected.best}")
    return found


def report(workers: int, results: Sequence[Result]) -> list[str]:
    """The outcome of the run left alone, and a row for each kind of fault.

    A row has the number of faults, of those in runs that ended as they must, and the time that
    training stood still.
    """
    alone, *others = results
    again = sum(len(result.starts) - 1 for result in others if result.starts)
    launches, seconds = (
        sum(result.launches for result in others),
        sum(result.seconds for result in others),
    )
    return [
        f"\n{workers} workers: the run left alone took {alone.seconds:.0f} seconds and came to",
        "nothing" if alone.evidence is None else alone.evidence.digest,
        f"the {len(others)} others took {seconds:.0f}, were launched {launches} times and went on "
        f"{again} times\n",
        "| fault | came | survived | seconds until training went on, median | most |",
        "|---|---|---|---|---|",
        *_rows(others),
    ]


def _rows(results: Sequence[Result]) -> Iterator[str]:
    for kind in sorted({fault.kind for result in results for fault in result.faults}):
        came = [
            (result, fault) for result in results for fault in result.faults if fault.kind == kind
        ]
        survived = sum(not result.problems for result, _ in came)
        waits = [wait for result, fault in came for wait in _waits(result, fault)]
        seconds = f"{statistics.median(waits):.1f} | {max(waits):.1f}" if waits else "- | -"
        yield f"| {kind} | {len(came)} | {survived} | {seconds} |"


def _waits(result: Result, fault: Fault) -> list[float]:
    """Seconds until training went on after a fault; none if it was the end already."""
    return [start - fault.time for start in result.starts if start > fault.time][:1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Drill, print, and return the exit status."""
    parser = argparse.ArgumentParser(
        description="Kill runs again and again, and compare them with one left alone."
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--torn", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loader", action="store_true", help="with processes that load samples")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    # With an exception, so that what has been started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    is_good, began = True, time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="kill-drill-"))
    for workers in options.workers:
        results = []
        faults = options.kills, options.torn
        for result in drill(folder, workers, *faults, options.seed, options.loader):
            results.append(result)
            _tell(f"{workers} workers, run {len(results)}", result)
        print("\n".join(report(workers, results)), flush=True)
        is_good &= not any(result.problems for result in results)
    verdict = (
        "all runs ended alike" if is_good else f"NOT all runs ended as they must, see {folder}"
    )
    if is_good:
        shutil.rmtree(folder)
    print(f"\n{verdict}; {time.monotonic() - began:.0f} seconds in all")
    return 0 if is_good else 1


def _tell(name: str, result: Result) -> None:
    print(f"{name}: {len(result.faults)} faults, {result.seconds:.0f} seconds", file=sys.stderr)
    for problem in result.problems:
        print(f"{name}: {problem}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
