"""Accuracy of networks made of two: between seeds, and of two that were fine-tuned from one.

    python -m benchmarks.merge DATA_FOLDER [seeds]

Fashion-MNIST, residual networks of three stages, in one process on one thread.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import fashion, paired
from syncnorm import SyncBatchNorm, recalibrate
from syncnorm.merge import chain_of_merges, interpolate, match_weights, repair
from syncnorm.train.models import BasicBlock, ResNet

WIDTHS, STEPS, TUNING_STEPS, BATCH = (32, 64, 128), 800, 200, 64
SAMPLES = 1000
HALVES = ((0, 2, 4, 6, 8), (1, 3, 5, 7, 9))

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def network() -> ResNet:
    """Seven 3x3 convolutions on maps of 14x14, 7x7 and 4x4."""
    model = ResNet(
        BasicBlock,
        (1, 1, 1),
        WIDTHS,
        "cifar",
        in_channels=1,
        num_classes=fashion.CLASSES,
        norm_layer=SyncBatchNorm,
    )
    model.conv1.stride = (2, 2)
    return model


def plain() -> nn.Sequential:
    """Convolutions without any normalisation layer."""
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def train(
    model: nn.Module, images: Tensor, labels: Tensor, seed: int, steps: int, lr: float
) -> None:
    """SGD with momentum; the learning rate falls linearly to 0."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    g = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        index = torch.randint(len(images), (BATCH,), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(model(images[index]), labels[index]).backward()
        optimizer.step()
        schedule.step()


def accuracy(model: nn.Module, data: Data) -> float:
    """On the test set, in %."""
    return 100 * fashion.correct(model, data[2], data[3]) / len(data[3])


def some(images: Tensor, seed: int) -> list[Tensor]:
    """Batches of training images, drawn at random."""
    g = torch.Generator().manual_seed(seed)
    return list(images[torch.randperm(len(images), generator=g)[:SAMPLES]].split(250))


def between_seeds(make: Callable[[], nn.Module], lr: float, seed: int, data: Data) -> list[float]:
    """Both ends; then their middle: as it is, repaired, matched, matched and repaired."""
    models = []
    for each in (2 * seed, 2 * seed + 1):
        torch.manual_seed(each)
        models.append(make())
        train(models[-1], data[0], data[1], each, STEPS, lr)
    a, b = models
    batches = some(data[0], seed)
    row = [accuracy(a, data), accuracy(b, data)]
    for other in (b, match_weights(a, b)):
        middle = interpolate(a, other)
        row.append(accuracy(middle, data))
        row.append(accuracy(repair(middle, a, other, batches), data))
    return row


def fine_tuned(make: Callable[[], nn.Module], lr: float, seed: int, data: Data) -> list[float]:
    """Both networks, each fine-tuned on half the labels; then what is made of them."""
    torch.manual_seed(100 + seed)
    base = make()
    train(base, data[0], data[1], 100 + seed, STEPS // 2, lr)
    models, batches = [], []
    for half in HALVES:
        images, labels = (part[fashion.of_labels(data[1], half)] for part in data[:2])
        models.append(copy.deepcopy(base))
        train(models[-1], images, labels, seed, TUNING_STEPS, lr / 2)
        batches.append(some(images, seed))
    everything = [torch.cat(pair) for pair in zip(*batches, strict=True)]
    has_norms = any(isinstance(each, SyncBatchNorm) for each in base.modules())
    average = interpolate(*models)
    row = [
        accuracy(base, data),
        *(accuracy(each, data) for each in models),
        accuracy(average, data),
    ]
    row.append(accuracy(recalibrate(average, everything), data) if has_norms else float("nan"))
    row.append(accuracy(chain_of_merges(models, batches), data))
    return row


def _print(title: str, columns: str, rows: dict[str, list[list[float]]]) -> None:
    print(f"\n{title}\n\n| network | {columns} |\n|{'---|' * (columns.count('|') + 2)}")
    for name, seeds in rows.items():
        means = [statistics.mean(values) for values in zip(*seeds, strict=True)]
        print(f"| {name} | {' | '.join('' if m != m else f'{m:.1f}' for m in means)} |", flush=True)


def main() -> None:
    paired.fix_allocator()
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    torch.set_num_threads(1)
    seeds = range(int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    data = fashion.load(Path(sys.argv[1]))
    networks = {"residual, batch norm": (network, 0.1), "four convolutions": (plain, 0.05)}
    print(f"Test accuracy in %, mean of {len(seeds)} seed(s), torch {torch.__version__}")
    _print(
        f"The middle of two networks of different seeds, {STEPS} steps of {BATCH} each",
        "one | other | middle | repaired | matched | matched and repaired",
        {
            name: [between_seeds(*each, seed, data) for seed in seeds]
            for name, each in networks.items()
        },
    )
    _print(
        f"Two networks from one, {TUNING_STEPS} steps on labels 0, 2, 4, 6, 8 and on 1, 3, 5, 7, 9",
        "before | one | other | average | average, recalibrated | chain of merges",
        {
            name: [fine_tuned(*each, seed, data) for seed in seeds]
            for name, each in networks.items()
        },
    )


if __name__ == "__main__":
    main()
