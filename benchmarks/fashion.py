"""Fashion-MNIST from its four gzip idx files, and the small network that is trained on it."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

CLASSES = 10


def load(root: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels.

    Images have the shape (N, 1, 28, 28) and are standardised, labels have (N,).
    """
    if not (root / "train-images-idx3-ubyte.gz").exists():
        raise SystemExit(
            f"No Fashion-MNIST in {root}. Pass the folder that holds its four .gz files, for "
            "example that of "
            "Debian's package dataset-fashion-mnist."
        )
    parts = []
    for name in ("train", "t10k"):
        images = (
            _read(root / f"{name}-images-idx3-ubyte.gz", header=16).view(-1, 1, 28, 28).float()
            / 255
        )
        parts += [
            (images - 0.2860) / 0.3530,
            _read(root / f"{name}-labels-idx1-ubyte.gz", header=8).long(),
        ]
    return tuple(parts)  # pyright: ignore[reportReturnType]


def _read(path: Path, header: int) -> Tensor:
    return torch.frombuffer(
        bytearray(gzip.decompress(path.read_bytes())[header:]), dtype=torch.uint8
    )


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
