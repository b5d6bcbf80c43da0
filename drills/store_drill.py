"""Runs that are killed while they are copied to S3, and go on from there on an empty machine.

    python -m drills.store_drill [--kills 20] [--workers 2] [--seed 0]

A run is left alone. The others are killed, all their processes at once, when the S3 server is about
to write or has just written some file of theirs, drawn by the seed; then they go on from their
address, each time in a folder that is empty. What the store holds at the end must have the SHA-256,
the record of every step and epoch and the best checkpoint of the run left alone. Else the exit
status is 1. Needs moto[server] and s3fs.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from drills.kill_drill import differences
from drills.kill_evidence import Evidence, gather
from drills.kill_run import OPTIONS, ROOT
from drills.local_s3 import BUCKET, local_s3
from syncnorm.train.storage.fetch import local_copy

_KILLS_PER_RUN = 10
# Of a checkpoint: six files and their manifest; so that a launch gets a checkpoint or two further.
_WRITES = 16
_DEADLINE_SECONDS = 600


class Killer:
    """Kills a process group when the server has seen so many writes of checkpoints' files."""

    def __init__(self) -> None:
        self._left, self._moment, self._group = 0, "", 0
        self.place: str | None = None

    def arm(self, left: int, moment: str) -> None:
        """Kill at the so-manieth write from now on; at none if there are none left."""
        self._left, self._moment, self.place = left, moment, None

    def aim(self, group: int) -> None:
        """Name the process group."""
        self._group = group

    def on_write(self, path: str, moment: str) -> None:
        """Count a write, and kill if it is the one."""
        if self._left <= 0 or moment != self._moment or "/checkpoints/" not in path:
            return
        self._left -= 1
        if self._left == 0:
            with suppress(ProcessLookupError):
                os.killpg(self._group, signal.SIGKILL)
            self.place = f"{moment} {path.partition('/checkpoints/')[2]}"


def run_once(
    folder: Path, kills: Sequence[tuple[int, str]], killer: Killer, workers: int
) -> tuple[Evidence | None, list[str], list[str]]:
    """Run to the end, with a kill in each of the first launches.

    Returns:
        What the store holds at the end, where the run was killed, and what is wrong.
    """
    url, places, problems = None, [], []
    for number in range(len(kills) + 1):
        here = folder / f"launch-{number}"
        here.mkdir(parents=True)
        killer.arm(*(kills[number] if number < len(kills) else (0, "")))
        status = _launch(here, url, killer, workers)
        url = url or next((f"s3://{BUCKET}/runs/{path.name}" for path in here.glob("runs/*")), None)
        if killer.place is not None:
            places.append(killer.place)
        elif status == 0:
            break
        else:
            said = (here / "stderr.txt").read_text(encoding="utf-8", errors="replace")
            return None, places, [f"exit status {status}: {said[-600:].strip()}"]
    there = folder / "copy"
    there.mkdir()
    os.chdir(there)
    assert url is not None
    evidence, wrong = gather(local_copy(url))
    return evidence, places, [*problems, *wrong]


def _launch(here: Path, url: str | None, killer: Killer, workers: int) -> int:
    options = [*OPTIONS, f"launch.workers={workers}", f"run_dir=s3://{BUCKET}/runs"]
    resume = [] if url is None else ["--resume", url]
    with (here / "stderr.txt").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "syncnorm", "train", "digits", *options, *resume],
            cwd=here,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
        killer.aim(process.pid)
        try:
            return process.wait(_DEADLINE_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Drill, print, and return the exit status."""
    parser = argparse.ArgumentParser(
        description="Kill runs while they are copied to S3, and let them go on from there."
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    draw, killer, began = random.Random(options.seed), Killer(), time.monotonic()
    plan = [
        (draw.randint(1, _WRITES), draw.choice(["before", "after"])) for _ in range(options.kills)
    ]
    came = survived = 0
    with (
        tempfile.TemporaryDirectory(prefix="store-drill-") as name,
        local_s3(killer.on_write) as s3,
    ):
        os.environ.update(s3)
        root, number = Path(name), 0
        alone, _, problems = run_once(root / "alone", [], killer, options.workers)
        if alone is None or problems:
            print("\n".join(["the run left alone failed", *problems]))
            return 1
        while came < options.kills:
            number += 1
            kills = plan[came : came + _KILLS_PER_RUN]
            got, places, problems = run_once(root / f"run-{number}", kills, killer, options.workers)
            problems += differences(alone, got)
            came += len(places)
            survived += 0 if problems else len(places)
            print(
                f"run {number}, killed {', '.join(places)}: {problems or 'ended alike'}", flush=True
            )
            if not places:
                break  # a kill that does not come ends the drill
        os.chdir("/")
    print(
        f"{survived} of {options.kills} kills survived on {options.workers} workers, with the same "
        f"bits: {alone.digest}; {time.monotonic() - began:.0f} seconds in all"
    )
    return 0 if survived == came == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
