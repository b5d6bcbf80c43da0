"""Accuracy where a statistic is over 16 samples, 8 each of 2 labels.

    python -m benchmarks.label_groups DATA_FOLDER [seeds]

Fashion-MNIST, 1500 steps of 128 samples, in one process.
Each group of 16 is a forward of its own, as on a worker of its own; `accumulate` gives the running
statistics of all eight groups, once per step.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import fashion, paired
from syncnorm import RenormSchedule, SyncBatchNorm, SyncBatchRenorm, accumulate

STEPS, GROUPS, GROUP = 1500, 8, 16

ROWS = {
    "batch norm over all 128": (SyncBatchNorm, 1),
    "batch norm over 16": (SyncBatchNorm, GROUPS),
    "batch renorm over 16": (
        lambda c: SyncBatchRenorm(c, momentum=0.1, schedule=RenormSchedule.constant(3.0, 5.0)),
        GROUPS,
    ),
}


def batch(by_label: list[Tensor], g: torch.Generator) -> Tensor:
    """Indices of 8 groups of 16: two labels each, 8 samples of each."""
    groups = []
    for _ in range(GROUPS):
        for label in torch.randperm(fashion.CLASSES, generator=g)[:2].tolist():
            samples = by_label[label]
            groups.append(samples[torch.randint(len(samples), (GROUP // 2,), generator=g)])
    return torch.cat(groups)


def train(norm, parts: int, seed: int, data: tuple[Tensor, ...]) -> float:
    """Test accuracy in %."""
    images, labels, test_images, test_labels = data
    torch.manual_seed(seed)
    model: nn.Module = fashion.network(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    by_label = [fashion.of_labels(labels, (label,)) for label in range(fashion.CLASSES)]
    g = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        index = batch(by_label, g)
        optimizer.zero_grad()
        with accumulate(model):
            for part in index.chunk(parts):
                (F.cross_entropy(model(images[part]), labels[part]) / parts).backward()
        optimizer.step()
        schedule.step()
    return 100 * fashion.correct(model, test_images, test_labels) / len(test_labels)


def main() -> None:
    paired.fix_allocator()
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    torch.set_num_threads(1)
    seeds = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    data = fashion.load(Path(sys.argv[1]))
    print(
        f"{STEPS} steps of {GROUPS} groups of {GROUP} = 2 labels x 8, {seeds} seed(s), torch "
        f"{torch.__version__}"
    )
    print("| statistics | mean accuracy | each seed |")
    print("|---|---|---|", flush=True)
    for name, (norm, parts) in ROWS.items():
        accuracies = [train(norm, parts, seed, data) for seed in range(seeds)]
        print(
            f"| {name} | {statistics.mean(accuracies):.1f} | "
            f"{', '.join(f'{a:.1f}' for a in accuracies)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
