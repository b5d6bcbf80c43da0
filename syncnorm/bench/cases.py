"""What layers are compared on: single layers by the shape of their input, and training steps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from syncnorm.errors import ConfigError

# Of ResNet-50 on images of 224x224, distinct ones: channels and height (= width).
_RESNET50 = (
    *((64, 112), (64, 56), (128, 56), (256, 56), (128, 28), (256, 28), (512, 28)),
    *((256, 14), (512, 14), (1024, 14), (512, 7), (2048, 7)),
)
_TINY = ((8, 64, 8, 8), (16, 512, 7, 7))
# A detection head on the finest level of two images of 800x1216; rows of points.
_HEAD, _POINTS = (2, 256, 100, 152), (200_000, 64)
MODELS = {"resnet18": 11_200_000, "resnet50": 23_500_000}
"""Networks, and the number of parameters of each."""
_SIZE = {"cpu": 64, "cuda": 224}


@dataclass(frozen=True)
class Case:
    """A layer's forward and backward pass, or a training step.

    Args:
        shape: of the input on each worker.
        channels_last: the memory format.
        model: a network under DDP; None for a layer alone.
    """

    shape: tuple[int, ...]
    channels_last: bool = False
    model: str | None = None

    @property
    def kind(self) -> Literal["layer", "model"]:
        return "layer" if self.model is None else "model"

    @property
    def name(self) -> str:
        what = self.kind if self.model is None else f"{self.kind} {self.model}"
        layout = " channels last" if self.channels_last else ""
        return f"{what} {'x'.join(map(str, self.shape))}{layout}"


def cases(batch: int, device: str, only: Collection[str] = ()) -> list[Case]:
    """Every case: models and points first, so that these are not cut, then by the time they take.

    Args:
        batch: samples on each worker, where the case does not say.
        device: "cpu" takes smaller images for models.
        only: parts of names; a case whose name has none of them is left out. All if empty.

    Raises:
        ConfigError: no case has such a name.
    """
    faces = {*_TINY, *((batch, channels, size, size) for channels, size in _RESNET50), _HEAD}
    by_size = sorted(faces, key=lambda shape: (shape[0] * shape[1] * shape[2] * shape[3], shape))
    images = (batch, 3, _SIZE[device], _SIZE[device])
    every = [*(Case(images, model=model) for model in MODELS), Case(_POINTS)]
    every += [Case(shape, last) for shape in by_size for last in (False, True)]
    for part in only:
        if not any(part in case.name for case in every):
            raise ConfigError(
                f"`--case` must be part of the name of a case, got {part!r}. There are: "
                f"{', '.join(case.name for case in every)}."
            )
    return [case for case in every if not only or any(part in case.name for part in only)]
