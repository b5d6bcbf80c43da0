"""Accuracy by normalisation and by what the workers see: iid, few samples, few labels, drift.

    python -m benchmarks.regimes DATA_FOLDER OUT [--data fashion_mnist] [--minutes 60] [--seeds 3]

DATA_FOLDER holds the files of Fashion-MNIST, MNIST or CIFAR-10, whichever `--data` names. Every row
and column is a list of overrides of a configuration of the trainer. All rows have one schedule. Its
learning rate is the lowest of six at which batch norm over the whole step is within a point of its
best on 2,048 validation samples, iid: less is their scatter.

Results are lines of OUT/results.jsonl, and what is there is not made again: call it as often as
there is time. Runs go seed by seed, and within a seed column by column, with all rows of a column
one after the other; a seed counts in a column once all rows have it. So a study that is cut short
compares rows over the same seeds. Writes OUT/table.md and OUT/page.html.

A step has 64 samples. What is provably the same is made in one process (`tests/train/test_study.py`
holds it against live workers): statistics over the whole step, lagged ones, or none, which do not
depend on the number of workers; renormalisation by each worker's part with pooled running
statistics, which `train.norm_batch` gives; and workers that share nothing, each with its statistics
and its share of the tests. The row "pooled" is made on as many live workers as the column says. In
the columns of 2 and 4 samples statistics are over that many, with pooled running statistics.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import paired, regimes_page
from benchmarks.study import Job, Study
from syncnorm.family import METHODS

BATCH = 64
NETWORKS = ("convolutional", "fully_connected")
RATES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SCATTER = 0.01
# Of the runs that choose the learning rate; no seed of the study.
CHOOSING_SEED = 1000


class Row(NamedTuple):
    """A normalisation.

    Args:
        options: overrides; `{part}` in one stands for the samples of a worker, `{workers}` for the
            number of workers.
        is_live: True if it is made on as many workers as the column says.
        few: overrides for the columns of few samples, if they are others; None: it has no part
            there.
        networks: that it fits.
    """

    options: tuple[str, ...]
    is_live: bool = False
    few: tuple[str, ...] | None = ()
    networks: tuple[str, ...] = NETWORKS


def _ours(name: str, sync: str, *more: str) -> tuple[str, ...]:
    return (f"norm.name={name}", f"norm.sync={sync}", "norm.momentum=0.1", *more)


_PARTS = "train.norm_batch={part}"
_APART = "model.options.workers={workers}"
TARGET = "batch norm over the step"
ROWS: dict[str, Row] = {
    TARGET: Row(_ours("sync_batch_norm", "batch")),
    "batch norm, local": Row(
        _ours("batch_norm", "none", _APART), few=_ours("sync_batch_norm", "batch", _PARTS)
    ),
    "batch norm, pooled": Row(_ours("sync_batch_norm", "batch"), True, None),
    "batch norm, lagged": Row(_ours("sync_batch_norm", "lagged")),
    "renorm, local": Row(_ours("sync_batch_renorm", "none", _APART), few=None),
    "renorm, running": Row(_ours("sync_batch_renorm", "batch", _PARTS)),
    "renorm, pooled": Row(_ours("sync_batch_renorm", "batch")),
    **{
        name.replace("_", " "): Row((f"norm.name={name}", "norm.sync=batch"))
        for name in sorted(METHODS)
    },
    "group norm": Row(("norm.name=group_norm", "norm.sync=none")),
    "group norm, standardized weights": Row(
        ("norm.name=group_norm", "norm.sync=none", "norm.weights=standardized"),
        networks=("convolutional",),
    ),
    "none": Row(("norm.name=none", "norm.sync=none")),
}


class Column(NamedTuple):
    """What the workers see.

    Args:
        options: overrides.
        workers: how many there are; 0: as many as have `part` samples each.
        part: samples of a worker.
    """

    options: tuple[str, ...]
    workers: int
    part: int


def _column(workers: int, *options: str) -> Column:
    return Column(options, workers, BATCH // workers)


def _groups(workers: int) -> tuple[str, ...]:
    # 8 samples of each label.
    labels = BATCH // workers // 8
    return ("data.regime=label_groups", f"data.parts={workers}", f"data.part_labels={labels}")


def _shards(workers: int) -> tuple[str, ...]:
    return ("data.regime=sharded_labels", f"data.parts={workers}")


COLUMNS: dict[str, Column] = {
    "iid, 4 workers": _column(4),
    "label groups, 4 workers": _column(4, *_groups(4)),
    "sharded labels, 4 workers": _column(4, *_shards(4)),
    "4 samples": Column((), 0, 4),
    "drift, 4 workers": _column(4, "data.regime=drift"),
    "iid, 2 workers": _column(2),
    "label groups, 2 workers": _column(2, *_groups(2)),
    "sharded labels, 2 workers": _column(2, *_shards(2)),
    "2 samples": Column((), 0, 2),
}


class Plan(NamedTuple):
    """What is asked for on the command line."""

    root: str
    data: str
    samples: int
    epochs: int
    seeds: int
    networks: tuple[str, ...]

    @property
    def side(self) -> int:
        """Pixels of an image's side."""
        return 32 if self.data == "cifar10" else 28

    def base(self, network: str, seed: int, rate: float) -> tuple[str, ...]:
        """The overrides that all rows and columns share."""
        side = (f"model.options.side={self.side}",) if network != "convolutional" else ()
        return (
            *(f"model.name=benchmarks.small_nets:{network}", *side),
            *("data.name=benchmarks.small_nets:some", f"data.root={self.root}"),
            *(f"data.options.name={self.data}", f"data.options.train={self.samples}"),
            *(f"train.global_batch={BATCH}", f"train.epochs={self.epochs}"),
            *("train.optimizer.weight_decay=5e-4", f"train.lr={rate}", f"train.seed={seed}"),
        )

    def job(self, network: str, row: str, column: str, seed: int, rate: float) -> Job | None:
        """Make the run of a cell; None if it has none."""
        kind, seen = ROWS[row], COLUMNS[column]
        if network not in kind.networks:
            return None
        options, workers = kind.options, seen.workers if kind.is_live else 1
        if not seen.workers:
            if kind.few is None:
                return None
            options, workers = kind.few or kind.options, 1
        options = tuple(option.format(part=seen.part, workers=seen.workers) for option in options)
        return Job((*self.base(network, seed, rate), *seen.options, *options), workers)

    def choices(self, network: str) -> dict[float, Job]:
        """The runs that choose a network's learning rate."""
        options = ROWS[TARGET].options
        return {rate: Job((*self.base(network, CHOOSING_SEED, rate), *options)) for rate in RATES}

    def blocks(self, rates: dict[str, float]) -> Iterator[tuple[int, str, str]]:
        """Yield seed, column and network of what is made as a whole, in the order of the study."""
        for seed in range(self.seeds):
            for column in COLUMNS:
                for network in rates:
                    yield seed, column, network

    def block(self, seed: int, column: str, network: str, rate: float) -> dict[str, Job]:
        """The runs of all rows."""
        jobs = {row: self.job(network, row, column, seed, rate) for row in ROWS}
        return {row: job for row, job in jobs.items() if job is not None}


def choose(study: Study, plan: Plan) -> dict[str, float]:
    """Choose the learning rate of each network that there is time for."""
    rates = {}
    for network in plan.networks:
        choices = plan.choices(network)
        if not study.run(choices.values()):
            break
        found = {rate: study.results[job.key]["validation"] or 0.0 for rate, job in choices.items()}
        rates[network] = min(rate for rate in found if found[rate] >= max(found.values()) - SCATTER)
    return rates


# By network, row and column: accuracies by seed, None where the loss was not finite.
Cells = dict[str, dict[str, dict[str, dict[int, float | None]]]]


def collect(study: Study, plan: Plan, rates: dict[str, float]) -> Cells:
    """Collect the accuracies of all seeds that all rows of a column have."""
    cells: Cells = {network: {row: {} for row in ROWS} for network in rates}
    for seed, column, network in plan.blocks(rates):
        jobs = plan.block(seed, column, network, rates[network])
        found = {row: study.result(job) for row, job in jobs.items()}
        for row, result in found.items():
            if result is not None and None not in found.values():
                cells[network][row].setdefault(column, {})[seed] = result["accuracy"]
    return cells


def begin(description: str | None, minutes: float) -> argparse.ArgumentParser:
    """Prepare this process for a study, and make a parser with the arguments that studies share."""
    paired.fix_allocator()
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", metavar="DATA_FOLDER")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument(
        "--data", default="fashion_mnist", choices=["fashion_mnist", "mnist", "cifar10"]
    )
    parser.add_argument("--minutes", type=float, default=minutes, help="after which no run begins")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8192, help="of the training set")
    return parser


def main() -> None:
    parser = begin(__doc__, minutes=60.0)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    given = parser.parse_args()
    if given.samples % BATCH:
        parser.error(f"--samples must be a multiple of {BATCH}, got {given.samples}")
    plan = Plan(
        given.root, given.data, given.samples, given.epochs, given.seeds, tuple(given.networks)
    )
    with Study(given.out, given.minutes) as study:
        rates = choose(study, plan)
        is_whole = len(rates) == len(plan.networks)
        for seed, column, network in plan.blocks(rates):
            jobs = plan.block(seed, column, network, rates[network]).values()
            is_whole = is_whole and study.run(jobs)
            print(f"{network}, seed {seed}: {column}", file=sys.stderr, flush=True)
            if not is_whole:
                break
        text = regimes_page.write(given.out, collect(study, plan, rates), plan, rates)
    print(text)
    print("\nall runs made" if is_whole else "\npartial: call it again to go on")


if __name__ == "__main__":
    main()
