"""The small networks and the part of a data set that studies train on, by name in a configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from syncnorm.placement import epoch_order
from syncnorm.train.data.datasets import DATASETS, Dataset
from syncnorm.train.models import NormLayer


def convolutional(in_channels: int, num_classes: int, norm_layer: NormLayer) -> nn.Sequential:
    """Three convolutions of 16, 32 and 64 channels, each halving the image.

    (N, in_channels, H, W) -> (N, num_classes). Convolutions have a bias, for rows without a norm.
    """
    layers: list[nn.Module] = []
    for before, after in ((in_channels, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, 2, padding=1), norm_layer(after), nn.ReLU()]
    return nn.Sequential(*layers, Mean(), nn.Linear(64, num_classes))


def fully_connected(
    in_channels: int,
    num_classes: int,
    norm_layer: NormLayer,
    side: int = 28,
    bend: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Three hidden layers of 128: (N, in_channels, side, side) -> (N, num_classes)."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before in (in_channels * side**2, 128, 128):
        layers += [nn.Linear(before, 128), norm_layer(128), bend()]
    return nn.Sequential(*layers, nn.Linear(128, num_classes))


def sigmoid(
    in_channels: int, num_classes: int, norm_layer: NormLayer, side: int = 28
) -> nn.Sequential:
    """`fully_connected` with the sigmoids of the 2015 paper's first experiment."""
    return fully_connected(in_channels, num_classes, norm_layer, side, nn.Sigmoid)


class Mean(nn.Module):
    """The mean over an image: (N, C, H, W) -> (N, C), also of none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


@lru_cache(maxsize=1)
def some(
    root: Path | None, name: str = "fashion_mnist", train: int = 8192, validation: int = 2048
) -> Dataset:
    """Take a part of a data set: training and validation samples, always the same, and all tests.

    Args:
        root: holds its files.
        name: of `DATASETS`.
        train: samples to train on.
        validation: further samples of its training set, which choose learning rates.
    """
    data = DATASETS[name](root)
    order = epoch_order(len(data.train), 0, 0)
    # Indexed by tensors, these are copies, which do not hold on to the rest.
    kept, held = order[:train], order[train : train + validation]
    return replace(data, train=data.train[kept], validation=data.train[held])
