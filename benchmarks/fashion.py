"""Fashion-MNIST, standardised, and the small network that is trained on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from syncnorm.train.data.builtin import fashion_mnist

CLASSES = 10


def load(root: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels.

    Images have the shape (N, 1, 28, 28) and are standardised, labels have (N,).
    """
    data = fashion_mnist(root)
    parts = []
    for split in (data.train, data.test):
        parts += [(split.images.float() / 255 - 0.2860) / 0.3530, split.labels]
    return tuple(parts)  # pyright: ignore[reportReturnType]


def network(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """Four convolutions, each followed by a normalisation layer and a ReLU."""
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 32, 2), (32, 64, 2), (64, 64, 1), (64, 128, 2)):
        layers += [
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            norm(after),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, CLASSES))


def of_labels(labels: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """Indices of the samples with one of these labels."""
    return torch.isin(labels, torch.tensor(wanted)).nonzero().flatten()


@torch.no_grad()
def correct(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Count the images that the model, in evaluation mode, gets right."""
    model.eval()
    right = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    )
    model.train()
    return right
