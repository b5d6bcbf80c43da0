"""Images of files, read with Pillow and made tensors."""

import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from syncnorm.errors import ConfigError
from syncnorm.train.data.inputs import Inputs
from syncnorm.train.data.sources.options import load_module

SUFFIXES = (
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)
# Not looked for in folders: not every Pillow reads them, or they are not of 8 bits for each channel.
_OTHERS = (
    ".avif",
    ".dcm",
    ".dng",
    ".exr",
    ".hdr",
    ".heic",
    ".heif",
    ".jp2",
    ".jxl",
    ".psd",
    ".svg",
)
# By content, whatever the suffix: on PostScript Pillow would start Ghostscript.
_FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000"),
    *("PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP"),
)
_log = logging.getLogger(__name__)
INSTALL = "pip install 'syncnorm[data]'"
# Of ImageNet's training images, for values from 0 to 1.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pillow() -> Any:
    """Import Pillow's PIL.Image."""
    return load_module("PIL.Image", INSTALL)


def is_image(name: str) -> bool:
    """Tell by its suffix whether a file is an image."""
    return name.lower().endswith(SUFFIXES)


def images_below(root: Path, start: str) -> Iterator[str]:
    """Yield the images in a folder `start` of root and in those below it, as paths from root.

    By name, a folder's own before those of its folders; without what a dot hides. Links are
    followed. A folder to which several lead, or one in a circle, counts once. Images of kinds that
    are not read are logged.

    Raises:
        OSError: a folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    others: Counter[str] = Counter()
    for folder, folders, files in os.walk(root / start, onerror=_raise, followlinks=True):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        below = os.path.relpath(folder, root)
        shown = sorted(each for each in files if not each.startswith("."))
        yield from (f"{below}/{each}" for each in shown if is_image(each))
        others.update(Path(each).suffix.lower() for each in shown if each.lower().endswith(_OTHERS))
    if others:
        counts = ", ".join(f"{number} {suffix}" for suffix, number in sorted(others.items()))
        _log.warning("%s: %s left out, of suffixes that are not read", root / start, counts)


def _raise(error: OSError) -> None:
    raise error


@cache
def _formats() -> tuple[str, ...]:
    """Those of `_FORMATS` that this Pillow was built with."""
    image_module = pillow()
    image_module.init()
    return tuple(each for each in _FORMATS if each in image_module.OPEN)


def open_image(file: str | BinaryIO, name: str = "") -> Any:
    """Read an image whole.

    Args:
        file: its path, or what it is read from.
        name: of it in messages; its path if not given.

    Raises:
        ConfigError: it cannot be read; names it.
    """
    image_module = pillow()
    try:
        image = image_module.open(file, formats=_formats())
        image.load()
        return image
    # A damaged file may raise anything: OSError, SyntaxError, ValueError, DecompressionBombError.
    except Exception as error:
        cause = str(error)
        if isinstance(error, image_module.UnidentifiedImageError):
            cause = f"another kind than {', '.join(_formats())}"
        raise ConfigError(
            f"{name or file}: must be an image that can be read, got {cause}"
        ) from None


@dataclass(frozen=True)
class ImageReader:
    """Makes a standardised tensor (channels, size, size) of an image.

    The shorter side is brought to `size` and the middle cut out. With `random_crop` a training
    image is a random part of the image instead, of 8 to 100 % of its area and of a ratio of 3:4 to
    4:3, brought to the size (Szegedy et al. 2015, "Going deeper with convolutions", section 6).

    Args:
        size: of both sides.
        channels: 3 for RGB, 1 for grey.
        mean: of each channel, for values from 0 to 1; None: ImageNet's.
        std: as above.
        random_crop: in training.
    """

    size: int
    channels: int
    mean: Sequence[float] | None
    std: Sequence[float] | None
    random_crop: bool = False

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.channels:
                raise ConfigError(
                    f"`data.options.{name}` must have {self.channels} values, one for each "
                    f"channel, got {len(values)}"
                )
        if self.std is not None and min(self.std) <= 0:
            raise ConfigError(f"`data.options.std` must be greater than 0, got {min(self.std)}")

    def read(self, path: str, *, in_training: bool) -> Tensor:
        """Read a file; ConfigError if it is no image."""
        return self.convert(open_image(path), path, in_training=in_training)

    def convert(self, image: Any, name: str, *, in_training: bool) -> Tensor:
        """Make a tensor of an image of Pillow's; `name` is for messages."""
        bilinear = pillow().Resampling.BILINEAR
        image = coloured(image, self.channels, name)
        if in_training and self.random_crop:
            return self._standardise(
                image.resize((self.size, self.size), bilinear, _random_box(*image.size))
            )
        return self._standardise(self.cut(image, bilinear))

    def cut(self, image: Any, resampling: Any) -> Any:
        """Cut the middle square out of an image of Pillow's, and bring it to the size."""
        return image.resize((self.size, self.size), resampling, _middle(image.size, 1))

    @property
    def inputs(self) -> Inputs:
        """The images as they are read, of bytes."""
        mean, std = ([255 * value for value in values] for values in self._figures())
        shape = self.channels, self.size, self.size
        return Inputs(shape=shape, dtype="uint8", mean=tuple(mean), std=tuple(std))

    def _figures(self) -> tuple[Sequence[float], Sequence[float]]:
        grey = self.channels == 1
        return (
            self.mean or ((sum(_MEAN) / 3,) if grey else _MEAN),
            self.std or ((sum(_STD) / 3,) if grey else _STD),
        )

    def _standardise(self, image: Any) -> Tensor:
        mean, std = (torch.tensor(values)[:, None, None] for values in self._figures())
        return (_channels_first(image).float() / 255 - mean) / std


def read_pixels(path: str, shape: Sequence[int]) -> Tensor:
    """Read an image of a file as bytes (C, H, W); of another size or ratio, the middle is resized.

    Raises:
        ConfigError: it is no image.
    """
    channels, height, width = shape
    image = coloured(open_image(path), channels, path)
    if image.size != (width, height):
        box = _middle(image.size, width / height)
        image = image.resize((width, height), pillow().Resampling.BILINEAR, box)
    return _channels_first(image)


def coloured(image: Any, channels: int, name: str) -> Any:
    """Give an image of Pillow's 3 channels for RGB or 1 for grey; `name` is for messages.

    Raises:
        ConfigError: it has more than 8 bits for each channel.
    """
    # Pillow cuts deeper values off at 255.
    if image.mode[0] in "IF":
        raise ConfigError(
            f"{name}: must have 8 bits for each channel, got mode {image.mode}. "
            "Bring it to 8 bits, or give arrays: data.name=npz."
        )
    if image.mode == "P":  # colours may be transparent
        image = image.convert("RGBA")
    return image.convert("RGB" if channels == 3 else "L")


def _channels_first(image: Any) -> Tensor:
    pixels = as_tensor(image)  # (H, W) or (H, W, 3)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def as_tensor(image: Any) -> Tensor:
    """Copy the pixels of an image of Pillow's: (H, W) or (H, W, C)."""
    return torch.from_numpy(np.array(image))


def _random_box(width: int, height: int) -> tuple[float, float, float, float]:
    """Draw left, top, right and bottom of a part of an image."""
    for _ in range(10):
        area = width * height * torch.empty(()).uniform_(0.08, 1).item()
        ratio = math.exp(torch.empty(()).uniform_(math.log(3 / 4), math.log(4 / 3)).item())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(torch.randint(width - w + 1, ()))
            top = int(torch.randint(height - h + 1, ()))
            return left, top, left + w, top + h
    return _middle((width, height), 1)  # of a very long image


def _middle(size: tuple[int, int], ratio: float) -> tuple[float, float, float, float]:
    """Give left, top, right and bottom of the largest part in the middle that has a ratio."""
    width, height = size
    w = min(width, height * ratio)
    h = w / ratio
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h
