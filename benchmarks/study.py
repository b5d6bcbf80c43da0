"""Studies of many small trainings: a budget of minutes, results on disk, runs on live workers.

A run is a list of overrides of configs/digits.yaml and a number of workers. Its result is a line of
`results.jsonl`; a run that has one is not made again, so a study that is cut short goes on.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.small_nets import PerWorker
from syncnorm.placement import shard, size
from syncnorm.testing import RankPool
from syncnorm.train.config.file import load_config
from syncnorm.train.data.feed import TEST, TRAIN, VALIDATION
from syncnorm.train.data.regimes import training_order
from syncnorm.train.setup import Setup, load_feed, make_bare_model, make_setup, task_of
from syncnorm.train.step import StepBatch, evaluate, training_step
from syncnorm.train.workers import Workers

RESULTS = "results.jsonl"
ALLOWED = ("benchmarks",)


class Job(NamedTuple):
    """A training run.

    Args:
        options: overrides of configs/digits.yaml.
        workers: on how many processes.
        every: steps between evaluations on the validation set; 0: none.
        until: accuracy there at which it ends, if there are any.
    """

    options: tuple[str, ...]
    workers: int = 1
    every: int = 0
    until: float = 2.0

    @property
    def key(self) -> str:
        """The name of its result."""
        return json.dumps(self)


Result = dict[str, Any]


def train(job: Job) -> Result:
    """Train this rank's part, as `syncnorm.train.loop` does.

    Returns:
        `accuracy` on the test set and `validation` accuracy, shares of 1, None of a run whose loss
        was not finite; `step`, the last; `losses`, the means of each tenth of the run; `seen`, the
        validation accuracies on the way.
    """
    # Whether layers pool is what a study compares.
    log = logging.getLogger("syncnorm")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return _train(job)
    finally:
        log.setLevel(level)


def _train(job: Job) -> Result:
    config = load_config("digits", job.options)
    workers = Workers(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    feed = load_feed(config, workers.device, ALLOWED)
    batch, epochs = config.train.global_batch, range(1, config.train.epochs + 1)
    total = math.ceil(feed.sizes[TRAIN] / batch) * len(epochs)
    task = task_of(config, workers.device, feed, ALLOWED)
    model = make_bare_model(config, workers.device, feed, total, ALLOWED)
    setup = make_setup(config, workers, feed, total, model, task)
    losses: list[float] = []
    seen: list[float] = []
    orders = (training_order(config, feed, epoch).split(batch) for epoch in epochs)
    steps = ((epoch, some) for epoch, order in zip(epochs, orders) for some in order)
    for epoch, indices in steps:
        batches = feed.batches(TRAIN, setup.forwards(indices), epoch)
        result = training_step(setup, batches, StepBatch(indices, epoch, len(losses) + 1))
        losses.append(result.loss)
        if not result.was_taken:
            return {"accuracy": None, "validation": None, "step": len(losses), "seen": seen}
        if job.every and len(losses) % job.every == 0:
            seen.append(_accuracy(setup, feed, VALIDATION))
            if seen[-1] >= job.until:
                break
    tenth = max(1, len(losses) // 10)
    return {
        "accuracy": _accuracy(setup, feed, TEST),
        "validation": _accuracy(setup, feed, VALIDATION),
        "step": len(losses),
        "losses": [round(statistics.mean(some), 4) for some in _chunks(losses, tenth)],
        "seen": seen,
    }


def _accuracy(setup: Setup, feed: Any, split: str) -> float:
    """Measure accuracy; workers in one process have a shard each, and their own statistics."""
    setup.flush_statistics()
    apart = [module for module in setup.model.modules() if isinstance(module, PerWorker)]
    if not apart:
        return _measure(setup, feed, split, setup.workers)
    number, right = len(apart[0].layers), 0.0
    for rank in range(number):
        for each in apart:
            each.worker = rank
        share = size(shard(feed.sizes[split], rank, number)) / feed.sizes[split]
        right += share * _measure(setup, feed, split, Workers(rank, number, setup.workers.device))
    return right


def _measure(setup: Setup, feed: Any, split: str, workers: Workers) -> float:
    return evaluate(setup.task, setup.model, feed, split, setup.config, workers)["accuracy"]


def _chunks(values: list[float], size: int) -> Iterator[list[float]]:
    return (values[start : start + size] for start in range(0, len(values), size))


class Study:
    """The results in a folder, and what is missing there.

    Args:
        folder: holds `results.jsonl`; is made.
        minutes: after which no further run begins.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / RESULTS
        self._end = time.monotonic() + 60 * minutes
        self.results: dict[str, Result] = {}
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                # The last line of a study that was killed may be torn.
                if line.endswith("}"):
                    found = json.loads(line)
                    self.results[found["key"]] = found["result"]
        self._pools: dict[int, RankPool] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def has_time(self) -> bool:
        """True until the budget is used up."""
        return time.monotonic() < self._end

    def result(self, job: Job) -> Result | None:
        """Return the result of a run that has been made."""
        return self.results.get(job.key)

    def run(self, jobs: Iterable[Job]) -> bool:
        """Make the runs that are missing, in their order; False if the budget ends before."""
        for job in jobs:
            if job.key in self.results:
                continue
            if not self.has_time:
                return False
            start = time.monotonic()
            result = self._pool(job.workers).run(train, job)[0]
            result["seconds"] = round(time.monotonic() - start, 1)
            self._keep(job, result)
        return True

    def _pool(self, workers: int) -> RankPool:
        if workers not in self._pools:
            pool = RankPool(workers, timeout_seconds=1800.0)
            self._pools[workers] = self._stack.enter_context(pool)
        return self._pools[workers]

    def _keep(self, job: Job, result: Result) -> None:
        self.results[job.key] = result
        # A torn line stays a line of its own.
        start = ""
        if self._path.exists() and self._path.stat().st_size:
            with self._path.open("rb") as file:
                file.seek(-1, 2)
                start = "" if file.read(1) == b"\n" else "\n"
        with self._path.open("a") as file:
            file.write(f"{start}{json.dumps({'key': job.key, 'result': result})}\n")


def spread(values: Mapping[int, float]) -> tuple[float, float]:
    """Mean of some values, by seed, and half the distance of the farthest two."""
    some = list(values.values())
    return statistics.mean(some), (max(some) - min(some)) / 2
