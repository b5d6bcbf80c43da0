"""Models and data that configurations of the tests name."""

from pathlib import Path

import torch
from torch import Tensor, nn

from syncnorm.train.data import Dataset, Split, digits, make_dataset


class Breaks(nn.Module):
    """A small network whose second convolution gives NaN for images with a pixel above `limit`."""

    def __init__(self, in_channels: int, num_classes: int, norm_layer, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.conv1 = nn.Conv2d(in_channels, 4, 3, bias=False)
        self.bn1 = norm_layer(4)
        self.bend = nn.ReLU()
        self.breaking = Break(limit)
        self.bn2 = norm_layer(4)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bend(self.bn1(self.conv1(x)))
        return self.fc(self.bn2(self.breaking(y, x)).mean((2, 3)))


class Break(nn.Module):
    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        is_bad = (x.amax((1, 2, 3), keepdim=True) > self.limit) if x.numel() else x.new_zeros(x.shape[0], 1, 1, 1) > 0
        return torch.where(is_bad, torch.nan, y)


class Noisy(nn.Module):
    """A network with dropout."""

    def __init__(self, in_channels: int, num_classes: int, norm_layer) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 3)
        self.bn = norm_layer(8)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.bn(self.conv(x)).relu().mean((2, 3))))


def one_bad_image(root: Path | None, bad: int) -> Dataset:
    """The digits, with one training image whose pixels are far from all others."""
    data = digits(root)
    images = data.train.images.double().clone()
    images[bad] = 1e6
    made = make_dataset(Split(images, data.train.labels), Split(data.test.images.double(), data.test.labels), 10)
    return Dataset(made.train, made.test, 10, data.mean, data.std)
