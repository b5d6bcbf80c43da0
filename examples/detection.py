"""Detection by the trainer: two heads, ragged targets, images without boxes, a loss of two terms.

    python -m syncnorm train examples/detection.yaml --allow examples

The configuration names `load`, `Detector` and `make_task`. As a program or a notebook it trains by
`syncnorm.fit`, from its own last lines:

    python examples/detection.py

The second head normalises over the boxes of all workers, of which one worker may have none.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import syncnorm
from syncnorm.train.data.splits import Splits

NormLayer = Callable[[int], nn.Module]
STRIDE = 4  # pixels of the image for one cell of the map
# Image, row and column of some cells: three tensors (M,).
Cells = tuple[Tensor, Tensor, Tensor]
Sample = tuple[Tensor, Tensor, Tensor]


# %%
class Rectangles(Dataset[Sample]):
    """Images of bright (class 1) and dark (class 2) rectangles: none, one or two of them.

    Args:
        count: of the images.
        size: height and width.
        first: seed of the first image.
    """

    def __init__(self, count: int, size: int, first: int) -> None:
        self.count, self.size, self.first = count, size, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        """Draw the image (1, H, W), its boxes (n, 4) as x1 y1 x2 y2, and their classes (n,)."""
        drawn = torch.Generator().manual_seed(self.first + index)
        image = 0.3 * torch.randn(1, self.size, self.size, generator=drawn)
        number = int(torch.randint(0, 3, (), generator=drawn))
        half = self.size // 2
        boxes = torch.zeros(number, 4)
        classes = torch.randint(1, 3, (number,), generator=drawn)
        for place in range(number):  # the first in the upper half, the second in the lower
            height, width = torch.randint(half // 2, half, (2,), generator=drawn).tolist()
            top = half * place + int(torch.randint(0, half - height, (), generator=drawn))
            left = int(torch.randint(0, self.size - width, (), generator=drawn))
            boxes[place] = torch.tensor([left, top, left + width, top + height])
            colour = 1.0 if classes[place] == 1 else -1.0
            image[:, top : top + height, left : left + width] += colour
        return image, boxes, classes


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Stack the images; boxes and classes stay a list, with an entry for each image."""
    images, boxes, classes = zip(*samples, strict=True)
    return {"images": torch.stack(images), "boxes": list(boxes), "classes": list(classes)}


def load(root: object, count: int = 400, size: int = 32) -> Splits:
    """Make the data sets; `root` is `data.root`, which they do not need."""
    parts = [Rectangles(n, size, seed) for n, seed in ((count, 0), (count // 4, 10_000))]
    test = Rectangles(count // 4, size, 20_000)
    return Splits(parts[0], test, parts[1], num_classes=3, in_channels=1, collate=collate)


# %%
class Detector(nn.Module):
    """A class for each cell of a map, and a box for some of the cells.

    Args:
        in_channels: of the images.
        num_classes: with class 0, nothing.
        norm_layer: makes normalisation layers.
        width: channels.
    """

    def __init__(
        self, in_channels: int, num_classes: int, norm_layer: NormLayer, width: int = 16
    ) -> None:
        super().__init__()

        def block(before: int, after: int, stride: int) -> list[nn.Module]:
            convolution = nn.Conv2d(before, after, 3, stride, 1, bias=False)
            return [convolution, norm_layer(after), nn.SiLU()]

        self.trunk = nn.Sequential(
            *block(in_channels, width, 2), *block(width, width, 2), *block(width, width, 1)
        )
        self.classes = nn.Sequential(*block(width, width, 1), nn.Conv2d(width, num_classes, 1))
        # On rows (M, C): the statistics are those of the boxes of all workers.
        self.boxes = nn.Sequential(
            nn.Linear(9 * width, width, bias=False),
            norm_layer(width),
            nn.SiLU(),
            nn.Linear(width, 4),
        )

    def forward(self, images: Tensor, cells: Cells | None = None) -> tuple[Tensor, Cells, Tensor]:
        """Compute class logits (N, K, H, W), and the sides (M, 4) of boxes, from their cells.

        Args:
            images: (N, C, STRIDE * H, STRIDE * W).
            cells: those with the upper left corner of a box; None: those in which something is found.
        """
        features = self.trunk(images)
        logits = self.classes(features)
        if cells is None:
            image, row, column = logits.argmax(1).nonzero(as_tuple=True)
            cells = image, row, column
        image, row, column = cells
        around = F.pad(features, (1, 1, 1, 1))
        rows = [around[image, :, row + dy, column + dx] for dy in range(3) for dx in range(3)]
        return logits, cells, self.boxes(torch.cat(rows, 1))


# %%
class Detection:
    """The loss of both heads, each over what it counts; and how many boxes are found."""

    best = "f1"

    def __init__(self, box_weight: float = 1.0) -> None:
        self.box_weight = box_weight

    def loss(self, model: nn.Module, batch: Any) -> dict[str, tuple[Tensor, int]]:
        """Compute two terms: of classes, a mean over images, and of boxes, a mean over boxes."""
        images, cells, boxes, classes = _targets(batch)
        logits, _, sides = model(images, cells)
        wanted = _class_map(logits, cells, classes)
        class_loss = F.cross_entropy(logits, wanted, reduction="sum")
        box_loss = F.smooth_l1_loss(sides, _sides(cells, boxes), reduction="sum")
        return {
            "classes": (class_loss, len(images)),
            "boxes": (self.box_weight * box_loss, len(boxes)),
        }

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, tuple[Tensor | int, Tensor | int]]:
        """Count the boxes that are found with their class and overlap by half."""
        images, cells, boxes, classes = _targets(batch)
        logits, found, sides = model(images)
        right = logits.argmax(1)[cells] == classes  # (M,)
        at = torch.full_like(logits[:, 0], -1, dtype=torch.long)
        at[found] = torch.arange(len(sides), device=sides.device)
        guesses = _boxes(cells, sides[at[cells].clamp(min=0)]) if len(sides) else boxes * 0
        hits = (right & (_overlap(guesses, boxes) > 0.5)).sum()
        return {"f1": (2 * hits, len(sides) + len(boxes)), "recall": (hits, len(boxes))}


def make_task(**options: Any) -> Detection:
    """Make the task; `options` are `task.options`."""
    return Detection(**options)


def _targets(batch: Any) -> tuple[Tensor, Cells, Tensor, Tensor]:
    """Take a batch apart: images, the cells of all boxes' corners, the boxes and their classes."""
    images: Tensor = batch["images"]
    # Something to join, also where the worker has no sample.
    boxes = torch.cat([images.new_zeros(0, 4), *batch["boxes"]])  # (M, 4)
    none = torch.zeros(0, dtype=torch.long, device=images.device)
    classes = torch.cat([none, *batch["classes"]])  # (M,)
    owners = [torch.full_like(own, image) for image, own in enumerate(batch["classes"])]
    corner = (boxes[:, :2] / STRIDE).long()
    return images, (torch.cat([none, *owners]), corner[:, 1], corner[:, 0]), boxes, classes


def _class_map(logits: Tensor, cells: Cells, classes: Tensor) -> Tensor:
    wanted = torch.zeros_like(logits[:, 0], dtype=torch.long)  # (N, H, W)
    wanted[cells] = classes
    return wanted


def _corner(cells: Cells) -> Tensor:
    """Give the pixel (x, y) of each cell's upper left corner, (M, 2)."""
    return torch.stack([cells[2], cells[1]], 1) * STRIDE


def _sides(cells: Cells, boxes: Tensor) -> Tensor:
    """Measure boxes (M, 4) from their cells' corners, in cells."""
    return (boxes - _corner(cells).repeat(1, 2)) / STRIDE


def _boxes(cells: Cells, sides: Tensor) -> Tensor:
    return sides * STRIDE + _corner(cells).repeat(1, 2)


def _overlap(first: Tensor, second: Tensor) -> Tensor:
    """Compute intersection / union of boxes (M, 4), pair by pair."""
    low = torch.maximum(first[:, :2], second[:, :2])
    high = torch.minimum(first[:, 2:], second[:, 2:])
    both = (high - low).clamp(min=0).prod(1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) for boxes in (first, second)]
    return both / (areas[0] + areas[1] - both).clamp(min=1e-9)


# %%
if __name__ == "__main__":
    result = syncnorm.fit(
        {
            "train": {"epochs": 6, "global_batch": 16, "lr": 0.01, "optimizer": {"name": "AdamW"}},
            "launch": {"workers": 2},
        },
        dataset=load,
        model=Detector,
        task=Detection(box_weight=2.0),
    )
    print(result.folder, result.metrics["test"])
