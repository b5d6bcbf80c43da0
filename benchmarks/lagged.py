"""Accuracy where each worker sees only some labels.

    python -m benchmarks.lagged DATA_FOLDER [seeds] [row ...]

Fashion-MNIST on 4 live gloo workers, 1500 steps of 4 x 32 samples.
The workers hold the labels {0, 1, 2}, {3, 4}, {5, 6, 7}, {8, 9} for good: the hardest case for
local statistics.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import fashion, paired
from syncnorm import Lagged, RenormSchedule, SyncBatchNorm, SyncBatchRenorm, prepare_ddp
from syncnorm.comm import exchange
from syncnorm.testing import RankPool

LABELS = ((0, 1, 2), (3, 4), (5, 6, 7), (8, 9))
STEPS, LOCAL_BATCH, LAYERS = 1500, 32, 4


class Row(NamedTuple):
    norm: Callable[[int], nn.Module]
    lr: float


def _renorm(channels: int) -> nn.Module:
    return SyncBatchRenorm(
        channels, momentum=0.1, schedule=RenormSchedule.constant(3.0, 5.0), sync="running"
    )


ROWS = {
    "batch 0.1": Row(SyncBatchNorm, 0.1),
    "batch 0.05": Row(SyncBatchNorm, 0.05),
    "lagged 0.05": Row(lambda c: SyncBatchNorm(c, sync="lagged"), 0.05),
    "lagged 0.1": Row(lambda c: SyncBatchNorm(c, sync="lagged"), 0.1),
    "lagged, no guard 0.1": Row(
        lambda c: SyncBatchNorm(c, sync=Lagged(max_drift=float("inf"))), 0.1
    ),
    "renorm, running 0.05": Row(_renorm, 0.05),
    "local batch norm 0.05": Row(nn.BatchNorm2d, 0.05),
}


def train(row: Row, seed: int, data: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """Test accuracy in %, and the share of layer-steps that waited in %."""
    images, labels, test_images, test_labels = data
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(seed)
    model = prepare_ddp(fashion.network(row.norm))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=row.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    mine = fashion.of_labels(labels, LABELS[rank])
    g = torch.Generator().manual_seed(1000 * seed + rank)
    waited = 0
    for _ in range(STEPS):
        index = mine[torch.randint(len(mine), (LOCAL_BATCH,), generator=g)]
        optimizer.zero_grad()
        with exchange.record() as record:
            F.cross_entropy(wrapped(images[index]), labels[index]).backward()
        waited += sum(e.kind == "moments" for e in record)
        optimizer.step()
        schedule.step()
    right = torch.tensor(fashion.correct(model, test_images[rank::world], test_labels[rank::world]))
    dist.all_reduce(right)
    return 100 * right.item() / len(test_labels), 100 * waited / (STEPS * LAYERS)


def _worker(root: str, seeds: int, names: list[str]) -> None:
    data = fashion.load(Path(root))
    for name in names:
        start = time.perf_counter()
        results = [train(ROWS[name], seed, data) for seed in range(seeds)]
        if dist.get_rank() == 0:
            accuracies = [a for a, _ in results]
            each = ", ".join(f"{a:.1f}" for a in accuracies)
            waiting = statistics.mean(w for _, w in results)
            seconds = (time.perf_counter() - start) / seeds
            print(
                f"| {name} | {statistics.mean(accuracies):.1f} | {each} | {waiting:.0f} % | "
                f"{seconds:.0f} |",
                flush=True,
            )


def main() -> None:
    paired.fix_allocator()
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    seeds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    names = sys.argv[3:] or list(ROWS)
    print(
        f"{len(LABELS)} workers x {LOCAL_BATCH}, {STEPS} steps, {seeds} seed(s), torch "
        f"{torch.__version__}"
    )
    print(
        "| layer, learning rate | mean accuracy | each seed | layer-steps that waited | seconds a "
        "run |"
    )
    print("|---|---|---|---|---|", flush=True)
    with RankPool(len(LABELS), timeout_seconds=paired.MOST_SECONDS) as pool:
        pool.run(_worker, sys.argv[1], seeds, names)


if __name__ == "__main__":
    main()
