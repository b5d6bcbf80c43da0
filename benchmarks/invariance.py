"""Curves of the same training on 1, 2, 3 and 4 workers: 100 steps, compared with one worker's.

    python -m benchmarks.invariance [DATA_FOLDER]

Scikit-learn's digits, and augmented Fashion-MNIST if DATA_FOLDER holds its files; batch norm and
batch renormalisation; statistics over all samples of a step, a half and an eighth of them, an
eighth also one after the other, compared with side by side; and runs that are stopped and resumed
on other numbers of workers. Ends with status 1 if a bound is missed:

    gap = |loss - loss of one worker| / loss of one worker
    float64: <= 1e-12 at every step
    float32: <= 4 * control at steps 1, 10, 50 and 100
    float32 with GELU in place of ReLU: <= 1e-4 at every step

In float32 curves part by themselves: where the input of a ReLU is so near 0 that the last bit
decides, a gradient is there or not. Without that they stay together. With it the measure is a
control: the largest gap, up to a step, of one worker whose weights are each one ulp off at the
start, at least half an ulp of the loss. It is the largest of several draws in all configurations of
a data set: when a ReLU decides otherwise for the first time is chance. One ulp in one weight alone
is no fair measure: other workers add up every sum of every layer in another order, at every step.
"""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from benchmarks import paired
from syncnorm import monitor
from syncnorm.model.monitor import Monitor
from syncnorm.placement import epoch_order
from syncnorm.testing import RankPool
from syncnorm.train import loop
from syncnorm.train.checkpoint.capture import Progress
from syncnorm.train.config.file import load_config
from syncnorm.train.data.builtin import DATASETS
from syncnorm.train.data.datasets import Dataset
from syncnorm.train.data.feed import TEST, TRAIN, MemoryFeed
from syncnorm.train.metrics import read_events
from syncnorm.train.setup import make_bare_model, make_setup, task_of
from syncnorm.train.step import StepBatch, evaluate, training_step
from syncnorm.train.workers import Workers

STEPS, SEEN_AT, WORLD_SIZES = 100, (1, 10, 50, 100), (1, 2, 3, 4)
FLOAT64_BOUND, FLOAT32_BOUND, SMOOTH_BOUND = 1e-12, 4.0, 1e-4
DRAWS = 4
"""Of one ulp up or down in each weight, in each configuration."""
LEGS = ((4, 37), (2, 60), (3, STEPS))
"""Of a run that is stopped and resumed: on how many workers, until which step."""
LAYERS = {
    "batch norm": ["norm.name=sync_batch_norm"],
    # Bounds that some channels reach and others do not.
    "batch renorm": [
        *(
            "norm.name=sync_batch_renorm",
            "norm.momentum=0.1",
            "norm.renorm.r_max=1.2",
            "norm.renorm.d_max=0.3",
        ),
        *("norm.renorm.warmup_steps=3", "norm.renorm.r_steps=60", "norm.renorm.d_steps=40"),
    ],
}


class Job(NamedTuple):
    """A training run.

    Args:
        options: overrides of configs/digits.yaml.
        samples: how many of the training set.
        steps: how many.
        nudged: seed of the draw by which each weight is one ulp off at the start; None: it is not.
        is_smooth: whether the network has GELU in place of ReLU.
    """

    options: list[str]
    samples: int
    steps: int = STEPS
    nudged: int | None = None
    is_smooth: bool = False

    def but(self, *options: str) -> Job:
        """This run with further overrides."""
        return self._replace(options=[*self.options, *options])


class Trained(NamedTuple):
    """The results of a run."""

    losses: list[float]
    """Of each step."""
    accuracy: float
    clipped: list[float]
    """Shares of r and d that were at their bounds."""


# Of each the last step of an epoch is short, 85 and 17 samples, so shards differ in size on any
# number of workers.
DIGITS = Job(["train.epochs=8", "train.lr=0.05", "train.global_batch=104"], samples=1437)
# A part of the training set, so that 100 steps are four epochs, each with other augmentations.
FASHION = Job(
    ["train.epochs=4", "train.lr=0.05", "train.global_batch=32", "data.name=fashion_mnist"],
    samples=817,
)
AUGMENT = ["data.augment.crop=2", "data.augment.flip=true"]


def train(job: Job) -> Trained:
    """Train this rank's part, as `syncnorm.train.loop` does."""
    config = load_config("digits", job.options)
    workers = Workers(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    data = _load(config.data.name, config.data.root, job.samples)
    feed = MemoryFeed(data, config, workers.device)
    per_epoch = math.ceil(len(data.train) / config.train.global_batch)
    total = config.train.epochs * per_epoch
    task = task_of(config, workers.device, feed)
    model = make_bare_model(config, workers.device, feed, total)
    setup = make_setup(config, workers, feed, total, model, task)
    if job.nudged is not None:
        _nudge(setup.model, job.nudged)
    watch, losses, clipped = monitor(setup.model), [], []
    for step in range(1, job.steps + 1):
        epoch, number = 1 + (step - 1) // per_epoch, (step - 1) % per_epoch
        indices = epoch_order(len(data.train), config.train.seed, epoch).split(
            config.train.global_batch
        )[number]
        with mock.patch.object(F, "relu", F.gelu if job.is_smooth else F.relu):
            batches = feed.batches(TRAIN, setup.forwards(indices), epoch)
            result = training_step(setup, batches, StepBatch(indices, epoch, step))
        assert result.was_taken, f"step {step}: the loss is {result.loss}"
        losses.append(result.loss)
        if step % 20 == 0:
            clipped.append(_clipped(watch))
    metrics = evaluate(setup.task, setup.evaluated_model, feed, TEST, config, workers)
    return Trained(losses, metrics["accuracy"], [mean(shares) for shares in zip(*clipped)])


@cache
def _load(name: str, root: str | None, samples: int) -> Dataset:
    data = DATASETS[name](None if root is None else Path(root))
    # Copies, which do not hold on to the rest.
    train, test = data.train[torch.arange(samples)], data.test[torch.arange(len(data.test))[:2000]]
    return replace(data, train=train, test=test)


def _nudge(model: nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            up = torch.rand(weight.shape, generator=draw) < 0.5
            weight.copy_(
                torch.nextafter(weight, torch.where(up, torch.inf, -torch.inf).to(weight.dtype))
            )


def _clipped(watch: Monitor) -> tuple[float, float]:
    layers = watch.read()["layers"].values()
    return mean(each["r_clipped"] or 0.0 for each in layers), mean(
        each["d_clipped"] or 0.0 for each in layers
    )


class Stop:
    """A watch that asks for a stop after a step of the run."""

    def __init__(self, after: int, progress: Progress) -> None:
        self._after = after
        self._progress = progress

    def alive(self) -> None:
        """Nobody listens."""

    @property
    def stop(self) -> str | None:
        """Why, if it is time."""
        return "enough" if self._progress.step + 1 >= self._after else None


def train_until(folder: str, job: Job, after: int) -> None:
    """Train from wherever the folder's run stands until after a step, and save."""
    workers, progress = (
        Workers(dist.get_rank(), dist.get_world_size(), torch.device("cpu")),
        Progress(),
    )
    loop.train(
        load_config("digits", job.options), workers, Path(folder), progress, Stop(after, progress)
    )


Pools = dict[int, list[RankPool]]


def run(pools: Pools, world_size: int, jobs: Sequence[Job]) -> list[Trained]:
    """Train each job on so many workers; as many jobs at a time as there are pools of them."""
    some = pools[world_size]

    def train_every(pool: RankPool, mine: Sequence[Job]) -> list[Trained]:
        return [_agreed(pool.run(train, job)) for job in mine]

    with ThreadPoolExecutor(len(some)) as threads:
        parts = list(
            threads.map(train_every, some, [jobs[start :: len(some)] for start in range(len(some))])
        )
    return [
        trained for turn in itertools.zip_longest(*parts) for trained in turn if trained is not None
    ]


def _agreed(results: list[Trained]) -> Trained:
    assert all(each == results[0] for each in results), "workers report different runs"
    return results[0]


def gaps(losses: list[float], expected: list[float]) -> list[float]:
    """|loss - expected| / expected of each step."""
    return [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)]


def control(nudged: list[list[float]]) -> list[float]:
    """The largest of some runs' gaps up to each step, at least half a float32 ulp.

    Four times it is then at least two ulps.
    """
    largest = itertools.accumulate((max(some) for some in zip(*nudged, strict=True)), max)
    return [max(gap, torch.finfo(torch.float32).eps / 2) for gap in largest]


def worst_ratio(some: list[float], bounds: list[float], at: Sequence[int]) -> tuple[float, int]:
    """The largest gap / control of these steps, and at which of them."""
    return max((some[step - 1] / bounds[step - 1], step) for step in at)


class Row(NamedTuple):
    """A layer, its statistics, and its results on each number of workers.

    Args:
        clipped: shares of r and d at their bounds.
        wide: of each number of workers the largest gap in float64.
        narrow: of each the gaps in float32.
        smooth: of each the largest gap in float32 with GELU.
        accuracies: in float32; the first is that of one worker.
    """

    layer: str
    statistics: str
    clipped: list[float]
    wide: list[float]
    narrow: list[list[float]]
    smooth: list[float]
    accuracies: list[float]


def measure(pools: Pools, job: Job, layer: str) -> tuple[list[Row], list[list[float]]]:
    """Train with a layer on every number of workers; the rows, and the gaps of the nudged runs."""
    job, found, nudged = job.but(*LAYERS[layer]), [], []
    global_batch = load_config("digits", job.options).train.global_batch
    for size in (global_batch, global_batch // 2, global_batch // 8):
        grouped = job.but(f"train.norm_batch={size}")
        jobs = _variants(grouped)
        nudges = [jobs[1]._replace(nudged=seed) for seed in range(DRAWS)]
        wide, narrow, smooth, *others = run(pools, 1, [*jobs, *nudges])
        nudged += [gaps(other.losses, narrow.losses) for other in others]
        kinds: list[tuple[str, Job, Sequence[int]]] = [(f"{size}", grouped, WORLD_SIZES[1:])]
        if size == global_batch // 8:
            kinds.append(
                (
                    f"{size}, one after the other",
                    grouped.but(f"launch.micro_batch={size}"),
                    WORLD_SIZES,
                )
            )
        for name, each, world_sizes in kinds:
            results = [run(pools, n, _variants(each)) for n in world_sizes]
            row = Row(
                layer,
                name,
                wide.clipped,
                [max(gaps(one.losses, wide.losses)) for one, _, _ in results],
                [gaps(two.losses, narrow.losses) for _, two, _ in results],
                [max(gaps(three.losses, smooth.losses)) for _, _, three in results],
                [narrow.accuracy, *(two.accuracy for _, two, _ in results)],
            )
            found.append(row)
            print(f"{layer}, {name}: float64 {max(row.wide):.1e}", file=sys.stderr, flush=True)
    return found, nudged


def _variants(job: Job) -> list[Job]:
    """In float64, in float32, and in float32 with GELU."""
    narrow = job.but("train.dtype=float32")
    return [job.but("train.dtype=float64"), narrow, narrow._replace(is_smooth=True)]


def compare(title: str, row: Row, bounds: list[float]) -> bool:
    """Print a row; whether its bounds hold."""
    ratios = [worst_ratio(some, bounds, SEEN_AT) for some in row.narrow]
    holds = (
        max(row.wide) <= FLOAT64_BOUND
        and max(ratios)[0] <= FLOAT32_BOUND
        and max(row.smooth) <= SMOOTH_BOUND
    )
    # A schedule that clips nothing, or everything, would show nothing of the clipping.
    holds = holds and (row.layer == "batch norm" or all(0.0 < share < 1.0 for share in row.clipped))
    cells = [
        " / ".join(f"{100 * share:.0f}" for share in row.clipped),
        " / ".join(f"{gap:.1e}" for gap in row.wide),
        " / ".join(f"{ratio:.2g} at {step}" for ratio, step in ratios),
        " / ".join(f"{gap:.1e}" for gap in row.smooth),
        " / ".join(f"{100 * accuracy:.1f}" for accuracy in row.accuracies),
        "holds" if holds else "MISSED",
    ]
    print(f"| {' | '.join([title, row.layer, row.statistics, *cells])} |", flush=True)
    return holds


def judge(pools: Pools, title: str, job: Job) -> bool:
    """Print the rows of a data set; whether all bounds hold."""
    found, nudged = zip(*(measure(pools, job, layer) for layer in LAYERS))
    bounds = control([some for each in nudged for some in each])
    verdicts = [compare(title, row, bounds) for each in found for row in each]
    known = ", ".join(f"{bounds[step - 1]:.1e} at {step}" for step in SEEN_AT)
    print(f"| {title} | control | | | | {known} | | | |", flush=True)
    return all(verdicts)


def resumed(pools: Pools, layer: str) -> bool:
    """Compare a run that is stopped and resumed with one that is not; True if the bound holds."""
    job = DIGITS.but(*LAYERS[layer], "train.norm_batch=13", "train.dtype=float64")
    (expected,) = run(pools, 1, [job])
    with tempfile.TemporaryDirectory() as folder:
        for world_size, until in LEGS:
            pools[world_size][0].run(train_until, folder, job, until)
        events, _ = read_events(Path(folder) / "metrics.jsonl")
    starts = [event["world_size"] for event in events if event["event"] == "start"]
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert starts == [world_size for world_size, _ in LEGS]
    difference = max(gaps(losses, expected.losses))
    holds = difference <= FLOAT64_BOUND
    legs = ", ".join(f"on {world_size} until step {until}" for world_size, until in LEGS)
    print(f"| {layer} | {legs} | {difference:.1e} | {'holds' if holds else 'MISSED'} |", flush=True)
    return holds


def tables(pools: Pools, data: dict[str, Job]) -> bool:
    """Print everything; whether all bounds hold."""
    print(
        f"{STEPS} steps, torch {torch.__version__}, one thread per worker. Where a column has "
        "several numbers, they are"
    )
    print(
        "of 2, 3 and 4 workers, and of 1 to 4 where one after the other is compared with side by "
        "side."
    )
    print()
    print(
        "| data | layer | norm_batch | r / d at their bounds, % | float64: largest gap | float32: "
        "gap / control "
        "| float32, GELU: largest gap | float32: test accuracy, %, first of one worker | verdict |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    verdicts = [judge(pools, title, job) for title, job in data.items()]
    print()
    print("| layer | digits, norm_batch 13, stopped and resumed | float64: largest gap | verdict |")
    print("|---|---|---|---|", flush=True)
    verdicts += [resumed(pools, layer) for layer in LAYERS]
    return all(verdicts)


def main() -> None:
    """Train and compare."""
    paired.fix_allocator()
    data = {"digits": DIGITS}
    if len(sys.argv) > 1:
        data["Fashion-MNIST"] = FASHION.but(*AUGMENT, f"data.root={sys.argv[1]}")
    start = time.perf_counter()
    with ExitStack() as stack:
        # Two of one worker: they train side by side.
        pools: Pools = {size: [] for size in WORLD_SIZES}
        for size in (1, *WORLD_SIZES):
            pools[size].append(stack.enter_context(RankPool(size, timeout_seconds=1800.0)))
        is_right = tables(pools, data)
    print()
    print(f"{(time.perf_counter() - start) / 60:.0f} minutes")
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
