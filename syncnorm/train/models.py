"""Residual networks (He et al. 2016, arXiv:1512.03385) whose normalisation layer is an argument.

Parameters carry torchvision's names, so its weights load: `conv1`, `bn1`, `layer1.0.conv1`,
`layer2.0.downsample.0`, `fc`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]
Stem = Literal["cifar", "imagenet"]


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def _conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


def _shortcut(
    in_channels: int, out_channels: int, stride: int, norm_layer: NormLayer
) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(_conv1x1(in_channels, out_channels, stride), norm_layer(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    (N, in_channels, H, W) -> (N, width, H/stride, W/stride).
    """

    conv1: nn.Conv2d
    bn1: nn.Module
    conv2: nn.Conv2d
    bn2: nn.Module
    downsample: nn.Module | None

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, width, stride)
        self.bn1 = norm_layer(width)
        self.conv2 = _conv3x3(width, width)
        self.bn2 = norm_layer(width)
        self.downsample = _shortcut(in_channels, width, stride, norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut.

    (N, in_channels, H, W) -> (N, 4 width, H/stride, W/stride).

    The stride sits in the 3x3 convolution, as in torchvision, not in the first 1x1 as in the paper.
    """

    conv1: nn.Conv2d
    bn1: nn.Module
    conv2: nn.Conv2d
    bn2: nn.Module
    conv3: nn.Conv2d
    bn3: nn.Module
    downsample: nn.Module | None

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, norm_layer: NormLayer) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = _conv1x1(in_channels, width)
        self.bn1 = norm_layer(width)
        self.conv2 = _conv3x3(width, width, stride)
        self.bn2 = norm_layer(width)
        self.conv3 = _conv1x1(width, out_channels)
        self.bn3 = norm_layer(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride, norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + shortcut)


class ResNet(nn.Module):
    """A residual network: images (N, in_channels, H, W) -> logits (N, num_classes).

    Args:
        block: class of a stage's blocks.
        depths: blocks per stage.
        widths: channels per stage before the block's expansion; stages after the first halve the
            resolution.
        stem: `"cifar"` keeps the resolution, `"imagenet"` divides it by 4 (7x7 stride 2, then a max
            pool).
        in_channels: channels of an image.
        num_classes: number of logits.
        norm_layer: from a number of channels to a layer.
    """

    conv1: nn.Conv2d
    maxpool: nn.Identity | nn.MaxPool2d
    bn1: nn.Module
    fc: nn.Linear

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        stem: Stem,
        *,
        in_channels: int,
        num_classes: int,
        norm_layer: NormLayer,
    ) -> None:
        super().__init__()
        channels = widths[0]
        if stem == "cifar":
            self.conv1 = _conv3x3(in_channels, channels)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(in_channels, channels, 7, 2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.bn1 = norm_layer(channels)
        self.stages: list[str] = []
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            blocks = nn.Sequential()
            for number in range(depth):
                stride = 2 if index > 1 and number == 0 else 1
                blocks.append(block(channels, width, stride, norm_layer))
                channels = width * block.expansion
            self.stages.append(f"layer{index}")
            self.add_module(self.stages[-1], blocks)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        # A mean, not an average pool: some pools refuse an empty batch, which a shard may be.
        return self.fc(x.mean((2, 3)))  # (N, C, H, W) -> (N, C) -> (N, num_classes)


_WIDTHS = (64, 128, 256, 512)

# Each takes in_channels, num_classes and norm_layer by name.
MODELS: dict[str, Callable[..., ResNet]] = {
    "digits_resnet": partial(ResNet, BasicBlock, (1, 1, 1), (16, 32, 64), "cifar"),
    "resnet18_cifar": partial(ResNet, BasicBlock, (2, 2, 2, 2), _WIDTHS, "cifar"),
    "resnet18_imagenet": partial(ResNet, BasicBlock, (2, 2, 2, 2), _WIDTHS, "imagenet"),
    "resnet50_cifar": partial(ResNet, Bottleneck, (3, 4, 6, 3), _WIDTHS, "cifar"),
    "resnet50_imagenet": partial(ResNet, Bottleneck, (3, 4, 6, 3), _WIDTHS, "imagenet"),
}
