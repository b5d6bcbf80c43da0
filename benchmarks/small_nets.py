"""The small networks and the part of a data set that studies train on, by name in a configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from syncnorm.placement import epoch_order
from syncnorm.train.data.builtin import DATASETS
from syncnorm.train.data.datasets import Dataset
from syncnorm.train.models import NormLayer


class PerWorker(nn.Module):
    """Several workers' layers with statistics of their own, in one process.

    In training the batch is cut into as many parts, of equal size, and each is normalised by its
    worker's layer. In evaluation `worker` says whose statistics hold. Weight and bias are shared.

    Args:
        norm_layer: makes a layer without exchanges.
        channels: of the input.
        workers: how many there are.
    """

    def __init__(self, norm_layer: NormLayer, channels: int, workers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(norm_layer(channels) for _ in range(workers))
        for layer in self.layers:
            layer.weight, layer.bias = self.layers[0].weight, self.layers[0].bias
        self.worker = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return self.layers[self.worker](x)
        parts = x.chunk(len(self.layers))
        return torch.cat([layer(part) for layer, part in zip(self.layers, parts, strict=True)])


def _of_workers(norm_layer: NormLayer, workers: int) -> NormLayer:
    if workers == 1:
        return norm_layer
    return lambda channels: PerWorker(norm_layer, channels, workers)


def convolutional(
    in_channels: int, num_classes: int, norm_layer: NormLayer, workers: int = 1
) -> nn.Sequential:
    """Three convolutions of 16, 32 and 64 channels, each halving the image.

    (N, in_channels, H, W) -> (N, num_classes). Convolutions have a bias, for rows without a norm.
    With several `workers` each has its own statistics.
    """
    norm_layer = _of_workers(norm_layer, workers)
    layers: list[nn.Module] = []
    for before, after in ((in_channels, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, 2, padding=1), norm_layer(after), nn.ReLU()]
    return nn.Sequential(*layers, Mean(), nn.Linear(64, num_classes))


def fully_connected(
    in_channels: int,
    num_classes: int,
    norm_layer: NormLayer,
    side: int = 28,
    workers: int = 1,
    bend: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Three hidden layers of 128: (N, in_channels, side, side) -> (N, num_classes)."""
    norm_layer = _of_workers(norm_layer, workers)
    layers: list[nn.Module] = [nn.Flatten()]
    for before in (in_channels * side**2, 128, 128):
        layers += [nn.Linear(before, 128), norm_layer(128), bend()]
    return nn.Sequential(*layers, nn.Linear(128, num_classes))


def sigmoid(
    in_channels: int, num_classes: int, norm_layer: NormLayer, side: int = 28
) -> nn.Sequential:
    """`fully_connected` with the sigmoids of the 2015 paper's first experiment."""
    return fully_connected(in_channels, num_classes, norm_layer, side, bend=nn.Sigmoid)


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
