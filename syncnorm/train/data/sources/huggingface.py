"""Data sets of Hugging Face's package `datasets`, saved on disk."""

import contextlib
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from syncnorm.errors import ConfigError
from syncnorm.train.config.section import Finite
from syncnorm.train.data.sources.files import check_not_empty, choose_splits
from syncnorm.train.data.sources.images import INSTALL, ImageReader, open_image, pillow
from syncnorm.train.data.sources.options import Classes, Column, Size, load_module, source
from syncnorm.train.data.splits import Splits

_INSTALL = "pip install datasets"
_NUMBERS = ("bool", "float", "int", "uint")


class Rows(Dataset[tuple[Tensor, Any]]):
    """Two columns of a data set: images or numbers, and their targets.

    Args:
        rows: the data set.
        columns: names of the input and of the target.
        reader: of images.
        in_training: True if images are changed at random.
        has_images: True if inputs are images, as they are encoded.
        mode: of Pillow, which the features ask for; None: as each image is.
    """

    def __init__(
        self,
        rows: Any,
        columns: tuple[str, str],
        reader: ImageReader,
        *,
        in_training: bool,
        has_images: bool,
        mode: str | None = None,
    ) -> None:
        self._rows, self._columns = rows, columns
        self._reader, self._in_training, self._has_images = reader, in_training, has_images
        self._mode = mode

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        row = self._rows[index]
        value, target = (row[name] for name in self._columns)
        target = int(target) if isinstance(target, bool) else target
        if self._has_images:
            name = f"row {index}"
            image = _decoded(_encoded(value, name), name, self._mode)
            return self._reader.convert(image, name, in_training=self._in_training), target
        numbers = torch.as_tensor(value, dtype=torch.float32)
        # A single number is one feature. As numpy has a target: a date needs more than float32.
        return numbers.reshape(numbers.shape or 1), torch.from_numpy(np.array(target))


def _encoded(image: Any, name: str) -> bytes:
    """The bytes of an image that is not decoded: its path may be an address, and leads anywhere.

    Raises:
        ConfigError: there are none.
    """
    encoded = image.get("bytes") if isinstance(image, dict) else None
    if not encoded:
        raise ConfigError(
            f"{name}: must hold an image itself, got its path or nothing. save_to_disk of a newer "
            "`datasets` writes images into the set."
        )
    return encoded


def _decoded(encoded: bytes, name: str, mode: str | None) -> Any:
    """Decode an image as `datasets` does: turned by its EXIF orientation, and in a mode of Pillow."""
    image = open_image(BytesIO(encoded), name)
    # What is wrong with it raises anything, as in `open_image`. The pixels have been read.
    with contextlib.suppress(Exception):
        image = load_module("PIL.ImageOps", INSTALL).exif_transpose(image)
    return image if mode in (None, image.mode) else image.convert(mode)


@source
def hf(
    root: Path,
    *,
    input: Column,
    target: Column,
    num_classes: Classes | None = None,
    size: Size = 224,
    channels: Literal[1, 3] = 3,
    mean: list[Finite] | None = None,
    std: list[Finite] | None = None,
    random_crop: bool = False,
) -> Splits:
    """Open what `save_to_disk` of the package `datasets` has written.

    That is a DatasetDict with the sets train, validation and test, or a single set to train on.
    Images are read as by `folder`; other inputs must be numbers, or lists of them.

    Args:
        root: the folder.
        input: name of the column of images or numbers.
        target: name of the column of classes or numbers.
        num_classes: None: as the features say, or the highest class of the training set and one.
        size: see `folder`.
        channels: see `folder`.
        mean: see `folder`.
        std: see `folder`.
        random_crop: see `folder`.

    Raises:
        ConfigError: it cannot be read, has no training set, or a column is missing.
    """
    datasets = load_module("datasets", _INSTALL)
    try:
        loaded = datasets.load_from_disk(str(root))
    except Exception as error:
        raise ConfigError(
            f"`data.root` must be what save_to_disk of Hugging Face's datasets wrote, got "
            f"{str(root)!r}: {error}"
        ) from None
    found = {"train": loaded}
    if isinstance(loaded, dict):
        names = choose_splits(loaded, "set", root)
        found = {split: loaded[name] for split, name in names.items()}
    if "train" not in found:
        raise ConfigError(
            f"`data.root` must hold a set train, got {', '.join(loaded)} in {str(root)!r}"
        )
    # As plain values and images, whatever the format that they were saved with.
    found = {split: rows.with_format(None) for split, rows in found.items()}
    for split, rows in found.items():
        for key, name in (("input", input), ("target", target)):
            if name not in rows.column_names:
                raise ConfigError(
                    f"`data.options.{key}` must name a column of {split}, "
                    f"{', '.join(rows.column_names)}, got {name!r}"
                )
        check_not_empty(split, len(rows), repr(str(root)))
        _check_targets(split, rows, target)
    # A row of another column may be an address, too, and is decoded with the rest of the row.
    found = {split: rows.select_columns([*{input, target}]) for split, rows in found.items()}
    train = found["train"]
    has_images = type(train.features[input]).__name__ == "Image"
    mode = train.features[input].mode if has_images else None
    if has_images:
        pillow()
        as_encoded = datasets.Image(decode=False)
        found = {split: rows.cast_column(input, as_encoded) for split, rows in found.items()}
    reader = ImageReader(size, channels, mean, std, random_crop)
    sets: dict[str, Any] = {
        split: Rows(
            rows,
            (input, target),
            reader,
            in_training=split == "train",
            has_images=has_images,
            mode=mode,
        )
        for split, rows in found.items()
    }
    return Splits(
        **sets,
        num_classes=num_classes or _count_classes(train, target),
        in_channels=channels if has_images else _width(train[0][input]),
        classes=getattr(train.features[target], "names", None),
        inputs=reader.inputs if has_images else None,
    )


def _check_targets(split: str, rows: Any, target: str) -> None:
    """Refuse a column with nothing in some row, or with one value a row that is no number."""
    feature = rows.features[target]
    kind = getattr(feature, "dtype", "")
    if type(feature).__name__ == "Value" and not kind.startswith(_NUMBERS):
        raise ConfigError(
            f"`data.options.target` must name a column of numbers or of classes, got {target!r} of "
            f"{kind}. `class_encode_column({target!r})` makes classes of it."
        )
    column = rows.data.column(target)
    if column.null_count:
        first = column.is_null().index(True).as_py()
        raise ConfigError(
            f"`data.options.target` must name a column with a value in each row, got none in row "
            f"{first} of {split} in {target!r}"
        )


def _count_classes(rows: Any, target: str) -> int | None:
    feature = rows.features[target]
    if hasattr(feature, "num_classes"):
        return feature.num_classes
    kind = getattr(feature, "dtype", "")
    if kind.startswith("float"):
        return 1
    if kind == "bool":
        return 2
    if kind.startswith(("int", "uint")):
        return load_module("pyarrow.compute", _INSTALL).max(rows.data.column(target)).as_py() + 1
    return None


def _width(value: Any) -> int:
    shape = torch.as_tensor(value).shape
    return shape[0] if shape else 1
