"""Images with a mask each, which has a class for each pixel."""

import logging
import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from syncnorm.errors import ConfigError
from syncnorm.train.config.section import Finite
from syncnorm.train.data.sources.files import (
    Paths,
    by_stem,
    check_not_empty,
    list_folder,
    split_folders,
)
from syncnorm.train.data.sources.images import ImageReader, as_tensor, is_image, open_image, pillow
from syncnorm.train.data.sources.options import Classes, Size, source
from syncnorm.train.data.splits import Splits

IGNORED = 255
_LOOKED_AT = 50  # masks
_log = logging.getLogger(__name__)
# Of Pillow: black and white, 8 bits, numbers of colours, 16 and 32 bits.
_MASK_MODES = ("1", "L", "P", "I;16", "I")


class MaskFolder(Dataset[tuple[Tensor, Tensor]]):
    """Images (C, size, size) and the classes of their pixels (size, size), int64.

    Args:
        images: paths of the images.
        masks: paths of their masks.
        num_classes: classes are smaller; or 255, which counts as none.
        reader: of images.
        flip: mirror every second pair.
    """

    def __init__(
        self, images: Paths, masks: Paths, num_classes: int, reader: ImageReader, *, flip: bool
    ) -> None:
        self._images, self._masks = images, masks
        self._num_classes, self._reader, self._flip = num_classes, reader, flip

    def without_changes(self) -> "MaskFolder":
        """The same pairs, none of them mirrored."""
        paths = self._images, self._masks
        return MaskFolder(*paths, self._num_classes, self._reader, flip=False)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self._images[index]
        image, mask = open_image(path), self._read_mask(self._masks[index])
        if image.size != mask.size:
            raise ConfigError(
                f"{self._masks[index]}: must have the size of its image, {image.size}, got "
                f"{mask.size}"
            )
        pixels = self._reader.convert(image, path, in_training=False)
        classes = as_tensor(self._reader.cut(mask, pillow().Resampling.NEAREST)).long()
        if self._flip and torch.rand(()) < 0.5:
            return pixels.flip(-1), classes.flip(-1)
        return pixels, classes

    def classes_of(self, index: int) -> list[int]:
        """The classes in a mask, 255 among them."""
        return np.unique(np.asarray(self._read_mask(self._masks[index]))).tolist()

    def _read_mask(self, path: str) -> Any:
        mask = open_image(path)
        if mask.mode not in _MASK_MODES:
            raise ConfigError(
                f"{path}: must have a class number for each pixel, in one channel, got mode "
                f"{mask.mode}. Turn its colours into numbers first."
            )
        classes = as_tensor(mask).long()
        wrong = classes[(classes >= self._num_classes) & (classes != IGNORED) | (classes < 0)]
        if len(wrong):
            raise ConfigError(
                f"{path}: must have classes from 0 to {self._num_classes - 1}, or {IGNORED} for "
                f"none, got {int(wrong[0])} at {len(wrong)} pixels"
            )
        return mask


@source
def masks(
    root: Path,
    *,
    num_classes: Classes,
    size: Size = 256,
    channels: Literal[1, 3] = 3,
    mean: list[Finite] | None = None,
    std: list[Finite] | None = None,
    flip: bool = False,
) -> Splits:
    """Find images and masks: root/{train,validation,test}/{images,masks}/*.

    An image and its mask differ in their suffixes only. The middle of both is brought to `size`, a
    mask by its nearest pixels.

    Args:
        root: the folder.
        num_classes: classes in the masks are smaller; 255 is none.
        size: of both sides of what the model sees.
        channels: 3 for RGB, 1 for grey.
        mean: of each channel, for values from 0 to 1; None: ImageNet's.
        std: as above.
        flip: in training, mirror every second image and its mask.

    Raises:
        ConfigError: there is no training set, a set is empty, or an image has no mask or two.
    """
    pillow()
    reader = ImageReader(size, channels, mean, std)
    folders = split_folders(root)
    if "train" not in folders:
        raise ConfigError(
            f"`data.root` must hold train/images and train/masks, got {str(root)!r} without train"
        )
    sets: dict[str, Any] = {
        split: MaskFolder(*_pairs(split, path), num_classes, reader, flip=flip and split == "train")
        for split, path in folders.items()
    }
    unchanged = sets["train"].without_changes()
    _warn_of_one_class(unchanged)
    return Splits(
        **sets,
        num_classes=num_classes,
        in_channels=channels,
        unchanged=unchanged,
        inputs=reader.inputs,
    )


def _warn_of_one_class(train: MaskFolder) -> None:
    """Log it if masks spread over the set hold one class and 255: a usual way to write two."""
    found: set[int] = set()
    # Not every n-th: sets are made with periods of their own.
    looked_at = random.Random(0).sample(range(len(train)), min(len(train), _LOOKED_AT))
    for index in looked_at:
        try:
            found.update(train.classes_of(index))
        except ConfigError:
            return  # the run names it, if it comes to this sample
        if len(found - {IGNORED}) > 1:
            return
    if IGNORED in found:
        _log.warning(
            "%d masks of the training set, all that were looked at, hold the class %s and %d alone, "
            "and %d counts as none: nothing is left to tell apart. If %d is a class, write it as 1.",
            len(looked_at),
            *sorted(found - {IGNORED}) or ["none"],
            IGNORED,
            IGNORED,
            IGNORED,
        )


def _pairs(split: str, root: Path) -> tuple[Paths, Paths]:
    pairs: list[dict[str, str]] = []
    for part in ("images", "masks"):
        names = [name for name in list_folder(root / part, is_folder=False) if is_image(name)]
        pairs.append(by_stem(names, "file", root / part))
    images, found = pairs
    single = sorted(images.keys() ^ found.keys())
    if single:
        raise ConfigError(
            f"`data.root` must hold a mask for each image, got {single[0]!r} in only one of images "
            f"and masks in {str(root)!r}"
        )
    check_not_empty(split, len(images), repr(str(root / "images")))
    stems = sorted(images)
    return (
        Paths(root / "images", [images[stem] for stem in stems]),
        Paths(root / "masks", [found[stem] for stem in stems]),
    )
