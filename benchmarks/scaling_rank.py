"""The workers of `benchmarks.scaling`: they count what a step sends, and take times."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import paired
from benchmarks.cost_model import Traffic
from syncnorm import SyncBatchNorm, explain, prepare_ddp
from syncnorm.comm import exchange, groups
from syncnorm.testing import RankPool

SYNCS = ("none", "running", "lagged", "batch")
WIDTHS = (16, 16, 32, 32, 64, 64)
BATCH, SIZE = 8, 32
# Numbers of float64 in a message: of a layer of 64, 512 and 4096 channels, and of a whole model.
SIZES = (130, 1026, 8194, 65538)
CALLS = 10
POOL_SECONDS = 600.0

Norm = Callable[[int], nn.Module]


@contextmanager
def workers(count: int, shared_memory: str | None = None) -> Iterator[RankPool]:
    """A pool of ranks with this setting of SYNCNORM_SHARED_MEMORY; None leaves it as it is."""
    before = os.environ.get("SYNCNORM_SHARED_MEMORY")
    if shared_memory is not None:
        os.environ["SYNCNORM_SHARED_MEMORY"] = shared_memory
    try:
        pool = RankPool(count, timeout_seconds=POOL_SECONDS)
    finally:
        os.environ.pop("SYNCNORM_SHARED_MEMORY", None)
        if before is not None:
            os.environ["SYNCNORM_SHARED_MEMORY"] = before
    with pool:
        yield pool


def layer(sync: str) -> Norm:
    """From a number of channels to the layer of this mode; torch's for "local"."""
    if sync == "local":
        return nn.BatchNorm2d
    return lambda channels: SyncBatchNorm(channels, sync=sync)


def network(norm: Norm, widths: Sequence[int] = WIDTHS) -> nn.Sequential:
    """Convolutions, each with its normalisation; every second one halves the image."""
    layers, before = [], 3
    for number, width in enumerate(widths):
        layers += [nn.Conv2d(before, width, 3, 1 + number % 2, 1, bias=False), norm(width)]
        layers += [nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def images(batch: int = BATCH) -> torch.Tensor:
    """This worker's images, each time the same."""
    generator = torch.Generator().manual_seed(groups.rank())
    return torch.randn(batch, 3, SIZE, SIZE, generator=generator)


def wrapped(sync: str, widths: Sequence[int] = WIDTHS) -> DistributedDataParallel:
    torch.manual_seed(0)
    return DistributedDataParallel(prepare_ddp(network(layer(sync), widths)))


def step_of(model: DistributedDataParallel, batch: int = BATCH) -> Callable[[], None]:
    """A training step on this worker's images."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x, labels = images(batch), torch.arange(batch) % 10

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def counted() -> dict[str, tuple[Traffic, Traffic]]:
    """On a worker: what a step sends by `explain`, and what it has sent, by `sync`."""
    found = {}
    for sync in SYNCS:
        model = wrapped(sync)
        step = step_of(model)
        for _ in range(3):  # a lagged layer waits in its first step
            step()
        said = explain(model, images())
        tally = exchange.Tally()
        step()
        totals = tally.take().values()
        made = Traffic(sum(t.count for t in totals), 8 * sum(t.numbers for t in totals))
        found[sync] = Traffic(said.messages, said.bytes), made
    return found


def times_of_messages(rounds: int) -> dict[tuple[str, int], float]:
    """On a worker: median seconds of a sum and of a gather, by numbers in the message."""
    group = groups.statistics_group(None)

    def calls(size: int, is_sum: bool) -> Callable[[], None]:
        message = torch.zeros(size, dtype=torch.float64)

        def run() -> None:
            for _ in range(CALLS):
                if is_sum:
                    exchange.sum_(message, group, "moments")
                else:
                    exchange.gather(message, group, "moments")

        return run

    kinds = {"sum": True, "gather": False}
    # A payload of one number less, since the identity travels with it.
    candidates = {
        f"{kind} {size}": calls(size - is_sum, is_sum)
        for kind, is_sum in kinds.items()
        for size in SIZES
    }
    taken = paired.rounds(candidates, rounds, warm_up=2)
    return {
        (kind, size): statistics.median(taken[f"{kind} {size}"]) / CALLS
        for kind in kinds
        for size in SIZES
    }


def times_of_steps(rounds: int) -> dict[str, list[float]]:
    """On a worker: seconds of each step, by `sync`, in rounds."""
    steps = {sync: step_of(wrapped(sync)) for sync in ("local", *SYNCS)}
    return paired.rounds(steps, rounds)
