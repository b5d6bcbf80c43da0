"""The samples of files: images, folders of images, arrays of numpy, tables."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from syncnorm.errors import ConfigError
from syncnorm.train.data.inputs import Inputs, Table
from syncnorm.train.data.sources.images import SUFFIXES, images_below, read_pixels
from syncnorm.train.data.sources.table import read_features

_ARRAYS = (".npy", ".npz")


@dataclass(frozen=True)
class Sample:
    """A sample of a file.

    Args:
        file: its path.
        index: of the sample, in a file of several; None in a file of one.
        value: raw, without a batch dimension.
    """

    file: str
    index: int | None
    value: Tensor

    @property
    def stem(self) -> str:
        """A name for files that are made of it."""
        stem = Path(self.file).stem
        return stem if self.index is None else f"{stem}-{self.index}"


@dataclass(frozen=True)
class Unread:
    """A file that holds no sample.

    Args:
        message: names it.
    """

    message: str


def read_samples(files: Iterable[Path], inputs: Inputs) -> Iterator[Sample | Unread]:
    """Yield the samples of files, in their order; of a folder the images below it, by name."""
    for path in files:
        if path.is_dir() and inputs.table is not None:
            yield Unread(f"{path}: must be a table or an array of the run's inputs, got a folder")
        elif path.is_dir():
            try:
                found = [path / each for each in images_below(path, "")]
            except OSError as error:
                yield Unread(
                    f"{error.filename}: must be a folder that can be read: {error.strerror}"
                )
                continue
            if not found:
                yield Unread(
                    f"{path}: must hold images, got none. They end in {', '.join(SUFFIXES)}."
                )
            for each in found:
                yield from _read(each, inputs)
        else:
            yield from _read(path, inputs)


def _read(path: Path, inputs: Inputs) -> Iterator[Sample | Unread]:
    try:
        if path.suffix in _ARRAYS:
            yield from _read_array(path, inputs)
        elif inputs.table is not None:
            yield from _read_table(path, inputs.table)
        else:
            yield Sample(str(path), None, _read_image(path, inputs))
    except ConfigError as error:
        yield Unread(str(error))


def _read_table(path: Path, table: Table) -> Iterator[Sample | Unread]:
    for index, row in enumerate(read_features(path, table)):
        is_read = isinstance(row, Tensor)
        yield Sample(str(path), index, row) if is_read else Unread(str(row))


def _read_image(path: Path, inputs: Inputs) -> Tensor:
    if not path.is_file():
        raise ConfigError(f"{path}: must be a file, got none")
    if not inputs.are_images or inputs.mean is None:
        raise ConfigError(
            f"{path}: the run's data set does not read images of files. Its inputs are "
            f"{inputs.describe()}: give them as an array, .npy or .npz."
        )
    return read_pixels(str(path), inputs.shape)


def _read_array(path: Path, inputs: Inputs) -> Iterator[Sample]:
    array = _load(path)
    try:
        values = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: is no array of numbers that torch has: {error}") from None
    is_one = tuple(values.shape) == inputs.shape
    if not is_one and (tuple(values.shape[1:]) != inputs.shape or not len(values)):
        raise ConfigError(
            f"{path}: must have the shape {inputs.shape} or {inputs.describe()}, got "
            f"{tuple(values.shape)}"
        )
    _check_type(path, values, inputs)
    if is_one:
        yield Sample(str(path), None, values)
        return
    for index, value in enumerate(values):
        yield Sample(str(path), index, value)


def _check_type(path: Path, values: Tensor, inputs: Inputs) -> None:
    """Refuse numbers of another kind than the training data: they are in other units, mostly."""
    state = (
        "as the data set prepares it" if inputs.mean is None else "as the training data are stored"
    )
    expected = f"{path}: must be {inputs.describe()}, {state}, got {values.dtype}"
    if values.is_floating_point() != inputs.is_floating_point:
        raise ConfigError(expected)
    wanted = getattr(torch, inputs.dtype)
    if torch.bool in (wanted, values.dtype) or wanted.is_floating_point or not values.numel():
        return
    least, most = int(values.numpy().min()), int(values.numpy().max())  # torch has none of uint16
    if least < torch.iinfo(wanted).min or most > torch.iinfo(wanted).max:
        raise ConfigError(f"{expected} with values from {least} to {most}")


def _load(path: Path) -> Any:
    try:
        array: Any = np.load(path, allow_pickle=False)
        if path.suffix == ".npz":
            with array as archive:
                if not archive.files:
                    raise ValueError("an archive of none")
                name = "x" if "x" in archive.files else archive.files[0]
                if name != "x" and len(archive.files) > 1:
                    raise ValueError(
                        f"several arrays, {', '.join(archive.files)}, and none named x"
                    )
                array = archive[name]
        if array.dtype.kind not in "biuf":
            raise ValueError(f"an array of {array.dtype}")
        return array
    # A damaged file may raise anything: OSError, EOFError, zipfile.BadZipFile.
    except Exception as error:
        cause = " ".join(str(error).split())
        raise ConfigError(f"{path}: must be an array of numbers, got {cause}") from None
