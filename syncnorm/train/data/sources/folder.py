"""Images in folders, one folder for each class."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from syncnorm.errors import ConfigError
from syncnorm.train.config.section import Finite
from syncnorm.train.data.sources.files import (
    Paths,
    check_not_empty,
    is_held_out,
    list_folder,
    split_folders,
)
from syncnorm.train.data.sources.images import SUFFIXES, ImageReader, images_below, pillow
from syncnorm.train.data.sources.options import Share, Size, source
from syncnorm.train.data.splits import Splits

# Class by class, the names of its files below the folder of the set.
_Found = dict[str, list[str]]


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images (C, size, size) and their classes.

    Args:
        paths: of the images.
        labels: (N,), int64.
        reader: of images.
        in_training: True if images are changed at random.
    """

    def __init__(
        self, paths: Paths, labels: Tensor, reader: ImageReader, *, in_training: bool
    ) -> None:
        self._paths = paths
        self.targets: Tensor = labels
        self._reader, self._in_training = reader, in_training

    def without_changes(self) -> "ImageFolder":
        """The same images, not changed at random."""
        return ImageFolder(self._paths, self.targets, self._reader, in_training=False)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self._reader.read(self._paths[index], in_training=self._in_training)
        return image, int(self.targets[index])


@source
def folder(
    root: Path,
    *,
    size: Size = 224,
    channels: Literal[1, 3] = 3,
    mean: list[Finite] | None = None,
    std: list[Finite] | None = None,
    random_crop: bool = False,
    test: Share = 0.0,
) -> Splits:
    """Find images by class: root/{train,validation,test}/CLASS/*, or root/CLASS/*.

    Classes are numbered in the order of their names. Images may lie in folders below that of their
    class; links are followed, and each folder counts once.

    Args:
        root: the folder.
        size: of both sides of what the model sees.
        channels: 3 for RGB, 1 for grey.
        mean: of each channel, for values from 0 to 1; None: ImageNet's.
        std: as above.
        random_crop: train on random parts of images; see `ImageReader`.
        test: share that is set apart for testing where root has no folder `train`, by a hash of
            each image's path.

    Raises:
        ConfigError: a class has no image, a set has none, or a class of another set is not in the
            training set.
    """
    pillow()
    reader = ImageReader(size, channels, mean, std, random_crop)
    folders = split_folders(root)
    if "train" in folders:
        if test:
            raise ConfigError(
                f"`data.options.test` must be 0 where {str(root)!r} has a folder train, got {test}"
            )
        found = {split: _images_by_class(path) for split, path in folders.items()}
    else:
        folders = {"train": root, "test": root}
        found = _cut(_images_by_class(root), test)
    classes = list(found["train"])
    for name, files in found["train"].items():
        if not files:
            raise ConfigError(
                f"`data.root` must hold images of each class, got none of {name!r} in "
                f"{str(folders['train'])!r}. Images end in {', '.join(SUFFIXES)}."
            )
    sets: dict[str, Any] = {
        split: _make_set(split, folders[split], by_class, classes, reader)
        for split, by_class in found.items()
    }
    unchanged = sets["train"].without_changes()
    return Splits(
        **sets,
        num_classes=len(classes),
        in_channels=channels,
        unchanged=unchanged,
        classes=classes,
        inputs=reader.inputs,
    )


def _images_by_class(root: Path) -> _Found:
    names = list_folder(root, is_folder=True)
    if not names:
        raise ConfigError(
            f"`data.root` must hold a folder of images for each class, got none in {str(root)!r}"
        )
    try:
        return {name: [*images_below(root, name)] for name in names}
    except OSError as error:
        raise ConfigError(
            "`data.root` must hold folders that can be read, got "
            f"{str(error.filename)!r}: {error.strerror}"
        ) from None


def _cut(found: _Found, share: float) -> dict[str, _Found]:
    """Cut the test set off."""
    if not share:
        return {"train": found}
    held = {
        name: [path for path in paths if is_held_out(path, share)] for name, paths in found.items()
    }
    kept = {
        name: [path for path in paths if not is_held_out(path, share)]
        for name, paths in found.items()
    }
    return {"train": kept, "test": held}


def _make_set(
    split: str, root: Path, found: _Found, classes: list[str], reader: ImageReader
) -> ImageFolder:
    unknown = [name for name in found if name not in classes]
    if unknown:
        raise ConfigError(
            f"`data.root` must hold the classes of the training set in each set, got {unknown[0]!r} "
            f"in {str(root)!r}, which is not in the training set"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    labels = [numbers[name] for name, paths in found.items() for _ in paths]
    check_not_empty(split, len(labels), repr(str(root)))
    paths = Paths(root, [path for some in found.values() for path in some])
    return ImageFolder(
        paths, torch.tensor(labels, dtype=torch.int64), reader, in_training=split == "train"
    )
