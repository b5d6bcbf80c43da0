"""Time of a whole training step on a CPU, by normalisation layer.

    python -m benchmarks.step_cpu [rounds [workers]]

ResNet-18 under DDP, 32 images of 64x64 on each of 2 gloo workers with one thread each, or of more. Models that
differ in their normalisation layer alone take turns; ratios are to local BatchNorm within a round.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import paired
from syncnorm import SyncBatchNorm, SyncBatchRenorm, prepare_ddp
from syncnorm.testing import RankPool
from syncnorm.train.models import MODELS

BATCH, SIZE = 32, 64

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "local BatchNorm2d": nn.BatchNorm2d,
    "SyncBatchNorm, sync=none": lambda c: SyncBatchNorm(c, sync="none"),
    "SyncBatchNorm, sync=running": lambda c: SyncBatchNorm(c, sync="running"),
    "SyncBatchRenorm, sync=running": lambda c: SyncBatchRenorm(c, sync="running"),
    "SyncBatchNorm, sync=lagged": lambda c: SyncBatchNorm(c, sync="lagged"),
    "SyncBatchNorm, sync=batch": SyncBatchNorm,
}


def _step(norm: Callable[[int], nn.Module], rank: int) -> Callable[[], None]:
    torch.manual_seed(0)
    model = MODELS["resnet18_imagenet"](in_channels=3, num_classes=10, norm_layer=norm)
    wrapped = DistributedDataParallel(prepare_ddp(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(rank))
    labels = torch.arange(BATCH) % 10

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(wrapped(images), labels).backward()
        optimizer.step()

    return step


def _worker(rounds: int) -> None:
    rank = dist.get_rank()
    steps = {name: _step(norm, rank) for name, norm in NORMS.items()}
    faults = paired.page_faults()
    seconds = paired.rounds(steps, rounds)
    if rank == 0:
        local = seconds["local BatchNorm2d"]
        for name, values in seconds.items():
            print(
                f"| {name} | {paired.ratio(values, local)} | "
                f"{1e3 * sorted(values)[len(values) // 2]:.0f} |"
            )
        print(f"page faults in all rounds: {paired.page_faults() - faults}", flush=True)


def main() -> None:
    paired.fix_allocator()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 41
    workers = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    print(
        f"{workers} workers, one thread each, {rounds} rounds; torch {torch.__version__}; "
        f"{paired.settings()}"
    )
    print("| normalisation | step time / local, median [95 % interval] | median ms |")
    print("|---|---|---|", flush=True)
    with RankPool(workers, timeout_seconds=paired.MOST_SECONDS) as pool:
        pool.run(_worker, rounds)


if __name__ == "__main__":
    main()
