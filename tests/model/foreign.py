"""Models and layers of others, for the tests of conversion; importable, so that they can be
pickled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from syncnorm.train.models import MODELS, Bottleneck, ResNet


class OwnForward(nn.BatchNorm2d):
    """A subclass that evaluates in a way of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Tied(nn.Module):
    """One batch norm under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.again = nn.ModuleDict({"norm": self.norm})

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        return self.again["norm"](self.second(x)).mean((2, 3))


class Softplus(nn.Module):
    """A weight that stays positive."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x)

    def right_inverse(self, y: Tensor) -> Tensor:
        return y.expm1().log()


def parametrized() -> nn.Module:
    model = _small(nn.BatchNorm2d(4))
    parametrize.register_parametrization(model[1], "weight", Softplus())
    return model


def _small(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.LazyLinear(5))


def lazy() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d(momentum=0.2), nn.Flatten(), nn.LazyLinear(5)
    )


def scale(layer: nn.Module, args: Any, y: Tensor) -> Tensor:
    return y * 1.5


def shift(layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] + 0.25,)


def double(layer: nn.Module, grads: Any) -> Any:
    return tuple(g * 2 for g in grads)


def add_key(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state[f"{prefix}note"] = torch.tensor(7)


def take_key(layer: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    state.pop(f"{prefix}note", None)


def hooked() -> nn.Module:
    model = _small(nn.BatchNorm2d(4))
    norm = model[1]
    norm.register_forward_hook(scale)
    norm.register_forward_pre_hook(shift)
    norm.register_full_backward_pre_hook(double)
    norm.register_state_dict_post_hook(add_key)
    norm.register_load_state_dict_pre_hook(take_key)
    norm.remark = "mine"
    return model


class Kept(nn.BatchNorm2d):
    """No forward of its own, but a method that others call and a `train` that freezes."""

    def train(self, mode: bool = True) -> Kept:
        return super().train(mode and not getattr(self, "is_frozen", False))

    def spread(self) -> Tensor:
        return self.running_var.sqrt()


class NormAct(nn.BatchNorm2d):
    """The interface of timm's layer: what it inherits, its two submodules and its forward."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


NormAct.__module__, NormAct.__qualname__, NormAct.__name__ = (
    "timm.layers.norm_act", "BatchNormAct2d", "BatchNormAct2d",
)  # fmt: skip


class SyncNormAct(nn.SyncBatchNorm):
    """What timm's own switch makes of that layer: torch's SyncBatchNorm with the two submodules."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


SyncNormAct.__module__, SyncNormAct.__qualname__, SyncNormAct.__name__ = (
    "timm.layers.norm_act", "SyncBatchNormAct", "SyncBatchNormAct",
)  # fmt: skip


class Unknown(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.0


def points() -> nn.Module:
    """Batch norms of two numbers of dimensions, without parameters, without a bias, and averaging
    all batches.
    """
    last = nn.BatchNorm1d(4, momentum=None)
    last.bias = None  # an argument in newer torch
    return nn.Sequential(
        nn.Flatten(2),
        nn.Conv1d(3, 6, 1),
        nn.BatchNorm1d(6, affine=False),
        nn.Flatten(),
        nn.LazyLinear(4),
        last,
    )


def volumes() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (3, 1)),
        nn.Conv3d(3, 4, (1, 3, 3)),
        nn.BatchNorm3d(4, momentum=0.3),
        nn.InstanceNorm3d(4),
    )


def basic() -> nn.Module:
    return MODELS["digits_resnet"](in_channels=3, num_classes=5, norm_layer=nn.BatchNorm2d)


def bottleneck() -> nn.Module:
    """ResNet-50 with fewer blocks and channels."""
    return ResNet(
        Bottleneck,
        (2, 1),
        (4, 8),
        "imagenet",
        in_channels=3,
        num_classes=5,
        norm_layer=nn.BatchNorm2d,
    )


def transformers_model(name: str) -> Callable[[], nn.Module]:
    """One of transformers' models from a small configuration, with random weights."""

    def make() -> nn.Module:
        library = pytest.importorskip("transformers", reason="transformers is not installed")
        sizes: dict[str, Any] = {
            "ResNet": {
                "embedding_size": 8,
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "layer_type": "bottleneck",
            },
            "MobileNetV2": {
                "image_size": 16,
                "depth_multiplier": 0.25,
                "depth_divisible_by": 4,
                "min_depth": 4,
            },
            "RegNet": {
                "embedding_size": 8,
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "groups_width": 4,
            },
        }
        config = getattr(library, f"{name}Config")(**sizes[name], num_labels=5)
        return Logits(getattr(library, f"{name}ForImageClassification")(config))

    return make


class Logits(nn.Module):
    """The tensor out of what a model of transformers returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "digits_resnet": basic,
    "resnet of bottlenecks": bottleneck,
    "transformers ResNet": transformers_model("ResNet"),
    "transformers MobileNetV2": transformers_model("MobileNetV2"),
    "transformers RegNet": transformers_model("RegNet"),
    "tied": Tied,
    "parametrized": parametrized,
    "lazy": lazy,
    "with hooks": hooked,
    "a subclass": lambda: _small(Kept(4)),
    "a normalisation with an activation": lambda: _small(NormAct(4)),
    "one and two dimensions": points,
    "three dimensions": volumes,
    "torch's SyncBatchNorm": lambda: _small(nn.SyncBatchNorm(4)),
}
