"""Data sets, models and tasks beyond images with a class each, for the tests of the trainer."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import syncnorm
from syncnorm.train.data.splits import Splits


class Rows(Dataset):
    """Random rows (8,), whose target is by `kind`; each is shaken at random when it is read."""

    def __init__(self, count: int, kind: str, start: int = 0) -> None:
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(8, 4, generator=generator, dtype=torch.float64)
        rows = torch.randn(start + count, 8, generator=generator, dtype=torch.float64)
        # Shards differ.
        self.rows = (rows + torch.linspace(-1, 1, start + count)[:, None])[start:]
        scores = self.rows @ weights
        self.targets = {
            "classes": scores.argmax(1),
            "labels": (scores > 0).double(),
            "values": scores[:, 0],
        }[kind]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.rows[index] + 0.1 * torch.rand(8), self.targets[index]


def rows(root: Path | None, kind: str = "classes", count: int = 301) -> Splits:
    return Splits(Rows(count, kind), Rows(60, kind, count), num_classes=4)


class Perceptron(nn.Module):
    """An MLP with norms over (N, C)."""

    def __init__(self, num_classes: int, norm_layer, outputs: int = 0, **_) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, 16, bias=False)
        self.norm = norm_layer(16)
        self.head = nn.Linear(16, outputs or num_classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(F.gelu(self.norm(self.hidden(x))))
        return y[:, 0] if y.shape[1] == 1 else y


class Shapes(Dataset):
    """Images (2, 12, 12) with a bright rectangle, mirrored at random; masks with ignored pixels."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.first + index)
        image = torch.randn(2, 12, 12, generator=generator, dtype=torch.float64) + index / 100
        top, left = torch.randint(0, 6, (2,), generator=generator).tolist()
        mask = torch.zeros(12, 12, dtype=torch.int64)
        mask[top : top + 6, left : left + 5] = 1 + index % 2
        image[:, mask > 0] += 2
        # Every third image has many, so that pixels are not as samples are.
        mask[:, : 1 + 8 * (index % 3 == 0)] = 255
        if torch.rand(()) < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        return image, mask


def shapes(root: Path | None, count: int = 61) -> Splits:
    return Splits(Shapes(count), Shapes(20, count), num_classes=3, in_channels=2)


class SmallUNet(nn.Module):
    """Down, across and up again."""

    def __init__(self, in_channels: int, num_classes: int, norm_layer) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(in_channels, 6, 3, padding=1), norm_layer(6), nn.GELU())
        self.low = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), norm_layer(8), nn.GELU())
        self.head = nn.Conv2d(14, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down(x)
        low = F.interpolate(self.low(high), scale_factor=2.0)
        return self.head(torch.cat([high, low], 1))


class SmallNet(nn.Module):
    """A convolution, and a class for each image."""

    def __init__(self, in_channels: int, num_classes: int, norm_layer) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 6, 3)
        self.norm = norm_layer(6)
        self.head = nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.norm(self.conv(x))).mean((2, 3)))


class Boxes(Dataset):
    """Images with 0 to 3 boxes; the boxes' numbers are ragged."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.first + index)
        image = torch.randn(1, 10, 10, generator=generator, dtype=torch.float64)
        number = (0, 2, 0, 1, 3)[index % 5]
        boxes = torch.rand(number, 4, generator=generator, dtype=torch.float64)
        return image + number, {"boxes": boxes, "labels": (boxes[:, 0] > 0.5).long()}


class Ragged(NamedTuple):
    images: Tensor
    targets: list[dict[str, Tensor]]


def collate_boxes(samples: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> Ragged:
    return Ragged(torch.stack([image for image, _ in samples]), [target for _, target in samples])


def boxes(root: Path | None, count: int = 61) -> Splits:
    return Splits(Boxes(count), Boxes(20, count), in_channels=1, collate=collate_boxes)


class TwoHeads(nn.Module):
    """For each image a score and, for each of its boxes, a class and a place."""

    def __init__(self, in_channels: int, num_classes: None, norm_layer) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(in_channels, 6, 3), norm_layer(6), nn.GELU())
        self.box_norm = norm_layer(6)
        self.number = nn.Linear(6, 1)
        self.classes = nn.Linear(6, 2)
        self.places = nn.Linear(6, 4)

    def forward(self, images: Tensor, counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        pooled = self.trunk(images).mean((2, 3))  # (N, 6)
        owner = [index for index, count in enumerate(counts) for _ in range(count)]
        features = self.box_norm(pooled[owner])  # (boxes, 6)
        return self.number(pooled)[:, 0], self.classes(features), self.places(features)


class Detect:
    """Three terms: over images, over boxes, and over the boxes' coordinates."""

    best = "accuracy"

    def loss(self, model: Any, batch: Ragged) -> dict[str, tuple[Tensor, int]]:
        number, classes, places = self._outputs(model, batch)
        wanted, labels, corners = self._targets(batch, number)
        return {
            "number": (F.mse_loss(number, wanted, reduction="sum"), len(wanted)),
            "classes": (F.cross_entropy(classes, labels, reduction="sum"), len(labels)),
            "places": (F.smooth_l1_loss(places, corners, reduction="sum"), corners.numel()),
        }

    def metrics(self, model: Any, batch: Ragged) -> dict[str, tuple[Tensor, int]]:
        number, classes, _ = self._outputs(model, batch)
        _, labels, _ = self._targets(batch, number)
        return {"accuracy": ((classes.argmax(1) == labels).sum(), len(labels))}

    def _outputs(self, model: Any, batch: Ragged) -> tuple[Tensor, Tensor, Tensor]:
        return model(batch.images, [len(target["boxes"]) for target in batch.targets])

    def _targets(self, batch: Ragged, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        counts = [len(target["boxes"]) for target in batch.targets]
        labels = [target["labels"] for target in batch.targets]
        corners = [target["boxes"] for target in batch.targets]
        nothing = torch.zeros(0, dtype=torch.int64), like.new_zeros(0, 4)
        return (
            like.new_tensor(counts),
            torch.cat([*labels, nothing[0]]),
            torch.cat([*corners, nothing[1]]),
        )


class Strange:
    """A task that gives what is not a loss, by `kind`."""

    best = ""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def loss(self, model: Any, batch: Any) -> Any:
        outputs = model(batch[0])
        total = outputs.square().sum()
        return {
            "vector": (outputs.square().sum(0), 1),
            "mean": total,
            "text": (total, "many"),
            "number": (1.0, 2),
            "negative": (total, -1),
            "nothing": {},
            "unnamed": {1: (total, 1)},
            "metrics": (total, len(outputs)),
        }[self.kind]

    def metrics(self, model: Any, batch: Any) -> Any:
        return {"accuracy": model(batch[0])} if self.kind == "metrics" else {}


class Mean:
    """A task that gives a mean in place of a sum, by `kind` in one of its terms."""

    best = ""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def loss(self, model: Any, batch: Any) -> Any:
        outputs, labels = model(batch[0]), batch[1]
        mean = F.cross_entropy(outputs, labels), len(labels)
        if self.kind == "whole":
            return mean
        if self.kind == "count of 1":
            return mean[0], 1
        if self.kind == "no mean":
            # A gradient within a loss, that takes no sample twice; and a term that is not per sample.
            assert len(torch.unique(batch[0], dim=0)) == len(labels)
            (inner,) = torch.autograd.grad(mean[0], outputs, create_graph=True)
            weights = sum(p.square().sum() for p in model.parameters())
            return {"boxes": (inner.square().sum(), len(labels)), "weights": (weights, 1)}
        if self.kind == "constant":
            weights = sum(p.square().sum() for p in model.parameters())
            chance, nothing = (torch.rand(()) + 1, 1), (0 * mean[0], 1)
            return {
                "weights": (weights, 1),
                "chance": chance,
                "nothing": nothing,
                "classes": (outputs.square().sum(), len(labels)),
            }
        return {"boxes": mean, "classes": (outputs.square().sum(), len(labels))}

    def metrics(self, model: Any, batch: Any) -> Any:
        return {}


class OtherTerms:
    """The last worker has terms of its own, by `kind`: "more" or "another"."""

    best = ""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def loss(self, model: Any, batch: Any) -> Any:
        term = model(batch[0]).square().sum(), len(batch[0])
        if dist.get_rank() < dist.get_world_size() - 1:
            return {"classes": term}
        return {"boxes": term} | ({"classes": term} if self.kind == "more" else {})

    def metrics(self, model: Any, batch: Any) -> Any:
        return {}


class Crossed:
    """Cross entropy, as one writes it."""

    best = ""

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        x, y = batch
        return F.cross_entropy(model(x), y, reduction="sum"), len(y)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, tuple[Tensor, int]]:
        return {"loss": Crossed.loss(self, model, batch)}


class TwoViews(Crossed):
    """Calls the model three times."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        x, y = batch
        apart = (model(x) - model(-x)).square().sum()
        return apart + F.cross_entropy(model(x), y, reduction="sum"), len(y)


class MeanTimesCount(Crossed):
    """NaN without samples."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        x, y = batch
        return F.cross_entropy(model(x), y) * len(y), len(y)


class Thawing(Perceptron):
    """Begins to train a part in its third training forward."""

    def __init__(self, num_classes: int, norm_layer, **_) -> None:
        super().__init__(num_classes, norm_layer)
        self.hidden.requires_grad_(False)
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += self.training
        if self.forwards == 5:
            self.hidden.requires_grad_(True)
        return super().forward(x)


class Folding(Perceptron):
    """Has no shape for nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(len(x), -1))


class Contrast:
    """A contrastive loss of each row against all rows of the step, by two views of it."""

    best = "-loss"
    needs_whole_step = True

    def loss(self, model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        rows, _ = batch
        features = F.normalize(model(torch.cat([rows, rows.flip(1)])), dim=1)
        queries, keys = features.chunk(2)
        everyone = syncnorm.gather(keys)
        # The own row is the nearest one of all, wherever it stands.
        own = (queries * keys).sum(1)
        return (torch.logsumexp(queries @ everyone.T / 0.2, 1) - own / 0.2).sum(), len(rows)

    def metrics(self, model: Any, batch: tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor, int]]:
        return {"loss": (model(batch[0]).square().sum(), len(batch[0]))}


class GatheredMetric(Contrast):
    """Measures by an exchange, which workers make unequally often."""

    def metrics(self, model: Any, batch: tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor, int]]:
        return {"loss": self.loss(model, batch)}


class Broken(Rows):
    """Fails at some samples: it raises, or ends its process."""

    def __init__(self, count: int, how: str) -> None:
        super().__init__(count, "classes")
        self.how = how

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 20 and self.how == "raises":
            raise OSError("the disk is gone")
        if index == 20 and self.how == "dies":
            os._exit(1)
        row, target = super().__getitem__(index)
        if index == 20 and self.how.endswith("class"):
            target = torch.tensor(12)
        return (row[:5] if index == 20 and self.how == "shape" else row), target


def broken(root: Path | None, how: str) -> Any:
    """Data sets with one fault of each kind."""
    good = Rows(60, "classes")
    if how in ("raises", "dies", "shape", "class", "held class"):
        return Splits(Broken(60, how), good, num_classes=4)
    return {
        "stream": Splits(iter(good), good),  # pyright: ignore[reportArgumentType]
        "empty": Splits(Rows(0, "classes"), good),
        "test raises": Splits(good, Broken(60, "raises"), num_classes=4),
        "test class": Splits(good, Broken(60, "class"), num_classes=4),
        "targets": Splits(Rows(60, "values"), good, num_classes=4),
    }[how]


class Unfit(Perceptron):
    """A perceptron with a parameter that is complex or lazy, by `kind`, or a complex buffer."""

    def __init__(self, kind: str, **rest: Any) -> None:
        super().__init__(**rest)
        if kind == "lazy":
            self.more = nn.LazyLinear(2)
        elif kind == "buffer":
            self.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
        else:
            self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
