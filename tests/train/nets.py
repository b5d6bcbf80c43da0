"""Models and data that configurations of the tests name."""

import threading
from pathlib import Path

import torch
from torch import Tensor, nn

from drills import kill_worker
from syncnorm.train.data.builtin import digits
from syncnorm.train.data.datasets import Dataset, Split, make_dataset
from syncnorm.train.models import MODELS, BasicBlock, ResNet


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
        is_bad = (
            (x.amax((1, 2, 3), keepdim=True) > self.limit)
            if x.numel()
            else x.new_zeros(x.shape[0], 1, 1, 1) > 0
        )
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


class Backwards(Noisy):
    """Dropout before a batch norm, and another at the end."""

    def __init__(self, in_channels: int, num_classes: int, norm_layer) -> None:
        super().__init__(in_channels, num_classes, norm_layer)
        self.last = norm_layer(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fc(self.bn(self.dropout(self.conv(x))).relu().mean((2, 3))))


def thin(in_channels: int, num_classes: int, norm_layer) -> ResNet:
    """digits_resnet with few channels: a CPU may take 40 times as long for float16 as for float32."""
    shape = {"in_channels": in_channels, "num_classes": num_classes, "norm_layer": norm_layer}
    return ResNet(BasicBlock, (1, 1, 1), (4, 8, 8), "cifar", **shape)


def few_digits(root: Path | None) -> Dataset:
    """A part of the digits: 317 = 4 * 79 + 1 to train, 80 to test."""
    data = digits(root)
    return make_dataset(data.train[:317], data.test[:80], 10)


def one_bad_image(root: Path | None, bad: int) -> Dataset:
    """The digits, with one training image whose pixels are far from all others."""
    data = digits(root)
    images = data.train.images.double().clone()
    images[bad] = 1e6
    made = make_dataset(
        Split(images, data.train.labels), Split(data.test.images.double(), data.test.labels), 10
    )
    return Dataset(made.train, made.test, 10, data.mean, data.std)


class Net(nn.Module):
    """Two convolutions, each with a norm.

    Args:
        in_channels: of the images.
        num_classes: of the output.
        norm_layer: from channels to a layer.
        arrives: `evaluating` as a whole; `frozen` in its first part; or `training`.
    """

    def __init__(
        self, in_channels: int, num_classes: int, norm_layer, arrives: str = "training"
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, 4, 3, bias=False), norm_layer(4), nn.ReLU()
        )
        self.body = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), norm_layer(8), nn.ReLU())
        self.fc = nn.Linear(8, num_classes)
        if arrives == "evaluating":
            self.eval()
        elif arrives == "frozen":
            self.stem.eval().requires_grad_(False)

    def features(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


class Freezing(Net):
    """A network with a stem frozen from the start; it freezes its body at the fifth step."""

    def __init__(self, in_channels: int, num_classes: int, norm_layer) -> None:
        super().__init__(in_channels, num_classes, norm_layer, "frozen")
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps = self.steps + 1
            if self.steps == 5:
                self.body.eval()
        return super().forward(x)


class Routed(Net):
    """Bright images take a path of their own; another path is there for none."""

    def __init__(self, in_channels: int, num_classes: int, norm_layer) -> None:
        super().__init__(in_channels, num_classes, norm_layer)
        self.bright = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        (where,) = (x.mean((1, 2, 3)) > 0.4).nonzero(as_tuple=True)
        if len(where):
            y = y.index_add(0, where, self.bright(y[where]))
        return self.fc(y)


class Remembering(Net):
    """A network with buffers of every kind that training changes.

    They are changed in place or replaced, saved or not, of any type, and some grow.
    """

    center: Tensor
    shift: Tensor
    is_bright: Tensor
    seen: Tensor
    queue: Tensor
    first: Tensor | None

    def __init__(self, in_channels: int, num_classes: int, norm_layer) -> None:
        super().__init__(in_channels, num_classes, norm_layer)
        self.register_buffer("center", torch.zeros(8))
        self.register_buffer("shift", torch.zeros(8), persistent=False)
        self.register_buffer("is_bright", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("queue", torch.zeros(0, 8))
        self.register_buffer("first", None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        z = y - self.center - self.shift - 0.1 * self.is_bright.any()
        if len(self.queue):
            z = z - 0.1 * self.queue.mean(0)
        if self.training and len(y):
            fresh = y.detach()
            self.center = 0.9 * self.center + 0.1 * fresh.mean(0)
            self.shift.lerp_(fresh.amax(0), 0.05)
            self.is_bright[int(self.seen) % 3] = True
            self.seen += len(x)
            self.queue = torch.cat([self.queue, fresh])[-100:]
            if self.first is None:
                self.first = fresh[0]
        return self.fc(z)


BUILT = 0
"""How many networks `own_norms` has made in this process."""


class Drawing(Net):
    """With noise of its own, which no layer makes."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


def own_norms(in_channels: int, num_classes: int, norm_layer=None) -> nn.Sequential:
    """A network for 8x8 images with two kinds of torch's own batch norms, which look trained."""
    global BUILT
    BUILT += 1
    two, one = nn.BatchNorm2d(4, eps=1e-3), nn.BatchNorm1d(16)
    for layer in (two, one):
        nn.init.constant_(layer.weight, 0.5)
        layer.running_mean.add_(0.1)  # pyright: ignore[reportOptionalMemberAccess]
        layer.running_var.mul_(3)  # pyright: ignore[reportOptionalMemberAccess]
    hidden, head = nn.Linear(144, 16), nn.Linear(16, num_classes)
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3), two, nn.ReLU(), nn.Flatten(), hidden, one, head
    )


def no_norms(in_channels: int, num_classes: int, norm_layer=None) -> nn.Module:
    """A network without a batch norm."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))


def rows(in_channels: int, num_classes: int, norm_layer) -> nn.Module:
    """A network whose layers see (N, C)."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64 * in_channels, 32), norm_layer(32), nn.Linear(32, num_classes)
    )


class Volumes(nn.Module):
    """A network whose layer sees (N, C, D, H, W)."""

    def __init__(self, in_channels: int, num_classes: int, norm_layer) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, 4, (1, 3, 3))
        self.bn = norm_layer(4)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x[:, :, None].expand(-1, -1, 3, -1, -1))).mean((2, 3, 4)))


class Locked(nn.Module):
    """A network that cannot be copied."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.net = MODELS["digits_resnet"](**options)
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Maps(nn.Module):
    """A network that gives something else than a logit for each class and image."""

    def __init__(self, in_channels: int, num_classes: int, norm_layer, kind: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, num_classes, 3)
        self.bn = norm_layer(num_classes)
        self.kind = kind

    def forward(self, x: Tensor):
        y = self.bn(self.conv(x))
        return {"map": y, "few": y.mean((2, 3))[:, 1:], "dict": {"logits": y}, "flat": y.flatten()}[
            self.kind
        ]


def same_net(**options) -> nn.Module:
    """`digits_resnet`, as code of the user's."""
    return MODELS["digits_resnet"](**options)


def no_module(**options):
    """Gives no network."""
    return nn.functional.relu


def fails(root: Path | None) -> Dataset:
    """Has a bug."""
    return torch.zeros(3)[7]  # pyright: ignore[reportReturnType]


def two_folders(root: Path | None):
    """Gives what is no data set."""
    return Path("train"), Path("test")


def one_class(root: Path | None) -> Dataset:
    """The digits, all of them called zero."""
    data = digits(root)
    sets = [Split(each.images, each.labels * 0) for each in (data.train, data.test)]
    return Dataset(*sets, 1, data.mean, data.std)


def masks(root: Path | None) -> Dataset:
    """The digits with a class for each pixel, made without a check."""
    data = digits(root)
    train = Split(data.train.images, (data.train.images[:, 0] > 8).long())
    return Dataset(train, train, 2, data.mean, data.std)


def forgetful(**options) -> nn.Module:
    """The network of the kill drill, in a worker whose optimizers do not load their state."""
    torch.optim.Optimizer.load_state_dict = lambda self, state: None
    return kill_worker.net(**options)
