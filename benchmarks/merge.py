"""Accuracy of one network made of two: of different seeds, and fine-tuned from one.

    python -m benchmarks.merge DATA_FOLDER

Fashion-MNIST, residual networks of three stages and one of plain convolutions, in one process on one
thread.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import fashion, paired
from syncnorm import SyncBatchNorm, recalibrate
from syncnorm.merge import chain_of_merges, interpolate, match_weights, repair
from syncnorm.train.models import BasicBlock, ResNet

STEPS, BASE_STEPS, TUNING_STEPS, BATCH = 800, 400, 200, 64
SAMPLES = 1000

Data = tuple[Tensor, Tensor]


def residual(width: int) -> ResNet:
    """Seven 3x3 convolutions with batch norms, on maps of 14x14, 7x7 and 4x4."""
    model = ResNet(
        BasicBlock,
        (1, 1, 1),
        (width, 2 * width, 4 * width),
        "cifar",
        in_channels=1,
        num_classes=fashion.CLASSES,
        norm_layer=SyncBatchNorm,
    )
    model.conv1.stride = (2, 2)
    return model


def plain(width: int) -> nn.Sequential:
    """Four 3x3 convolutions without any normalisation."""
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 1, 2), (1, 1, 1), (1, 2, 2), (2, 2, 1)):
        inputs = before * width if layers else 1
        layers += [nn.Conv2d(inputs, after * width, 3, stride, padding=1), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight)
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, fashion.CLASSES)
    )


NETWORKS = {
    "residual, batch norm, widths 16 to 64": lambda: residual(16),
    "residual, batch norm, widths 32 to 128": lambda: residual(32),
    "four convolutions, no norm, widths 32 and 64": lambda: plain(32),
}


def train(model: nn.Module, data: Data, seed: int, steps: int, lr: float) -> nn.Module:
    """SGD with momentum; the learning rate falls linearly to 0."""
    images, labels = data
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
    return model


def accuracy(model: nn.Module, *tests: Data) -> str:
    """On each test set, in %."""
    return " / ".join(f"{100 * fashion.correct(model, *t) / len(t[1]):.1f}" for t in tests)


def some(images: Tensor) -> list[Tensor]:
    """Batches of training images, drawn at random."""
    g = torch.Generator().manual_seed(0)
    return list(images[torch.randperm(len(images), generator=g)[:SAMPLES]].split(250))


def between_seeds(make, training: Data, test: Data) -> list[str]:
    """Both ends; then their middle: as it is, repaired, matched, matched and repaired."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(train(make(), training, seed, STEPS, 0.1))
    a, b = models
    row = [accuracy(a, test), accuracy(b, test)]
    for other in (b, match_weights(a, b)):
        middle = interpolate(a, other)
        row.append(accuracy(middle, test))
        row.append(accuracy(repair(middle, a, other, some(training[0])), test))
    return row


def fine_tuned(base: nn.Module, tasks: Sequence[Data], tests: Sequence[Data]) -> list[str]:
    """The network before; both that were fine-tuned from it; what is made of them."""
    models = [train(copy.deepcopy(base), task, 0, TUNING_STEPS, 0.05) for task in tasks]
    batches = [some(images) for images, _ in tasks]
    everything = [torch.cat(pair) for pair in zip(*batches, strict=True)]
    average = interpolate(*models)
    row = [accuracy(each, *tests) for each in (base, *models, average)]
    row.append(accuracy(recalibrate(average, everything), *tests))
    return [*row, accuracy(chain_of_merges(models, batches), *tests)]


def _rotated(data: Data) -> Data:
    return data[0].rot90(1, (2, 3)).contiguous(), data[1]


def _of(data: Data, labels: tuple[int, ...]) -> Data:
    index = fashion.of_labels(data[1], labels)
    return data[0][index], data[1][index]


def _print(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    paired.fix_allocator()
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    torch.set_num_threads(1)
    images, labels, *others = fashion.load(Path(sys.argv[1]))
    training, test = (images, labels), (others[0], others[1])
    print(
        f"Test accuracy in %; one run; {SAMPLES} images for statistics; torch {torch.__version__}"
    )
    print(f"\nTwo networks of different seeds, {STEPS} steps of {BATCH} each\n")
    _print(
        *("network", "one", "other", "middle", "repaired", "matched", "matched and repaired"),
    )
    _print(*["---"] * 7)
    for name, make in NETWORKS.items():
        _print(name, *between_seeds(make, training, test))
    print(f"\nTwo residual networks (32 to 128), {TUNING_STEPS} steps from one of {BASE_STEPS}\n")
    _print(
        *("tasks", "before", "one", "other", "average", "average, recalibrated"),
        "chain of merges",
    )
    _print(*["---"] * 7)
    torch.manual_seed(100)
    base = train(residual(32), training, 100, BASE_STEPS, 0.1)
    halves = [_of(training, half) for half in ((0, 2, 4, 6, 8), (1, 3, 5, 7, 9))]
    _print("even labels, odd labels; on all labels", *fine_tuned(base, halves, [test]))
    turned = [training, _rotated(training)]
    _print(
        "upright, rotated by 90 degrees; on each",
        *fine_tuned(base, turned, [test, _rotated(test)]),
    )


if __name__ == "__main__":
    main()
