"""Segmentation by the trainer: a small U-Net, masks with ignored pixels, random mirror images.

    python -m syncnorm train examples/segmentation.yaml --allow examples

The configuration names `load` and `UNet`. As a program or a notebook it trains by `syncnorm.fit`,
from its own last lines:

    python examples/segmentation.py

Statistics are pooled and random numbers are drawn by sample, so the run is the same on any number
of workers.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import syncnorm
from syncnorm.train.data.splits import Splits

NormLayer = Callable[[int], nn.Module]
IGNORED = 255  # of the mask; task.name segment leaves such pixels out of its loss and metrics


# %%
class Shapes(Dataset[tuple[Tensor, Tensor]]):
    """Images of a disc (class 1) and a square (class 2) before noise (class 0).

    The pixels at the edges of the shapes are ignored.

    Args:
        count: of the images.
        size: height and width.
        first: seed of the first image.
        mirror: mirror every second image, at random.
    """

    def __init__(self, count: int, size: int, first: int, mirror: bool = False) -> None:
        self.count, self.size, self.first, self.mirror = count, size, first, mirror

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Draw the image (1, H, W) and its mask (H, W)."""
        drawn = torch.Generator().manual_seed(self.first + index)
        places = torch.arange(self.size) + 0.5
        mask = torch.zeros(self.size, self.size, dtype=torch.long)
        for shape in (1, 2):
            radius = self.size * (0.15 + 0.1 * torch.rand((), generator=drawn))
            y, x = self.size * (0.2 + 0.6 * torch.rand(2, generator=drawn))
            dy, dx = (places - y).abs()[:, None], (places - x).abs()[None]
            distance = torch.hypot(dy, dx) if shape == 1 else torch.maximum(dy, dx)  # (H, W)
            mask[distance < radius] = shape
            mask[(distance - radius).abs() < 0.7] = IGNORED
        noise = torch.randn(1, self.size, self.size, generator=drawn)
        image = noise + (mask[None] == 1) * 1.5 - (mask[None] == 2) * 1.5
        if self.mirror and torch.rand(()) < 0.5:  # seeded by the trainer: (seed, epoch, index)
            image, mask = image.flip(-1), mask.flip(-1)
        return image, mask


def load(root: object, count: int = 400, size: int = 32) -> Splits:
    """Make the data sets; `root` is `data.root`, which they do not need."""
    return Splits(
        train=Shapes(count, size, 0, mirror=True),
        validation=Shapes(count // 4, size, 10_000),
        test=Shapes(count // 4, size, 20_000),
        num_classes=3,
        in_channels=1,
    )


# %%
class UNet(nn.Module):
    """Two steps down and up again, with the finer maps joined in on the way."""

    def __init__(
        self, in_channels: int, num_classes: int, norm_layer: NormLayer, width: int = 8
    ) -> None:
        super().__init__()

        def block(before: int, after: int) -> nn.Sequential:
            convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
            return nn.Sequential(convolution, norm_layer(after), nn.ReLU())

        self.fine = block(in_channels, width)
        self.middle = block(width, 2 * width)
        self.coarse = block(2 * width, 4 * width)
        self.middle_again = block(6 * width, 2 * width)
        self.fine_again = block(3 * width, width)
        self.head = nn.Conv2d(width, num_classes, 1)
        self.down = nn.AvgPool2d(2)
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (N, K, H, W)."""
        fine = self.fine(images)
        middle = self.middle(self.down(fine))
        coarse = self.coarse(self.down(middle))
        middle = self.middle_again(torch.cat([middle, self.up(coarse)], 1))
        return self.head(self.fine_again(torch.cat([fine, self.up(middle)], 1)))


# %%
if __name__ == "__main__":
    result = syncnorm.fit(
        {
            "task": {"name": "segment"},
            "train": {"epochs": 4, "global_batch": 16, "lr": 0.1, "optimizer": {"momentum": 0.9}},
            "launch": {"workers": 2},
        },
        dataset=load,
        model=UNet,
    )
    print(result.folder, result.metrics["test"])
