"""Data sets in memory.

Images stay as they are stored, mostly as bytes, and are standardised batch by batch: every worker
holds the whole set, and as float64 it would take 8 times the memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from syncnorm.errors import ConfigError
from syncnorm.placement import epoch_order
from syncnorm.train.data.inputs import Inputs


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W), of the dtype they are stored in, and their labels (N,), int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Split":
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device | str) -> "Split":
        """Move to a device; dtypes stay."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A training set and a test set, perhaps a validation set; `make_dataset` makes one.

    Args:
        train: the training set.
        test: the test set.
        num_classes: number of classes; labels are smaller.
        mean: (C,), float64, of the training set's pixels, as they are stored.
        std: (C,), float64, as above.
        validation: the validation set, if there is one.
        classes: names of the classes, for predictions.
    """

    train: Split
    test: Split
    num_classes: int
    mean: Tensor
    std: Tensor
    validation: Split | None = None
    classes: Sequence[str] | None = None

    def to(self, device: torch.device | str) -> "Dataset":
        """Move the splits to a device; dtypes stay."""
        return replace(
            self,
            train=self.train.to(device),
            test=self.test.to(device),
            validation=None if self.validation is None else self.validation.to(device),
        )

    @property
    def inputs(self) -> Inputs:
        """What a model is given, before it is standardised."""
        images = self.train.images
        return Inputs(
            shape=tuple(images.shape[1:]),
            dtype=str(images.dtype).removeprefix("torch."),
            mean=tuple(self.mean.tolist()),
            std=tuple(self.std.tolist()),
        )

    def check(self) -> "Dataset":
        """Return this with labels in int64; see `checked_splits` for what is refused."""
        train, test = checked_splits(self.train, self.test, self.num_classes)
        return replace(self, train=train, test=test)

    def hold_out(self, share: float) -> "Dataset":
        """Set a share of the training set apart for validation, always the same samples.

        Raises:
            ConfigError: it leaves no sample for training or for validation.
        """
        if not share or self.validation is not None:
            return self
        kept, held = hold_out_indices(len(self.train), share)
        return replace(self, train=self.train[kept], validation=self.train[held])


def make_dataset(
    train: Split, test: Split, num_classes: int, classes: Sequence[str] | None = None
) -> Dataset:
    """Check two splits and measure the training set's mean and standard deviation (biased).

    The deviation of a channel whose pixels are all equal counts as 1, so that it becomes 0.

    Args:
        train: the training set.
        test: the test set.
        num_classes: labels are from 0 to this, which is none of them.
        classes: names of the classes, for predictions.

    Raises:
        ConfigError: see `checked_splits`; or images are not finite.
    """
    train, test = checked_splits(train, test, num_classes)
    mean, std = _measure(train.images)
    if not std.isfinite().all():
        raise ConfigError(
            f"training set: images must be finite, got mean {mean.tolist()} and std {std.tolist()}"
        )
    return Dataset(train, test, num_classes, mean, std, classes=classes)


def checked_splits(train: Split, test: Split, num_classes: int) -> tuple[Split, Split]:
    """Check that a classifier of images can learn from two splits; their labels become int64.

    Raises:
        ConfigError: a split is empty or of other types or shapes, images differ in shape, or a
            label is out of range.
    """
    for name, split in (("training", train), ("test", test)):
        if not (
            isinstance(split, Split)
            and isinstance(split.images, Tensor)
            and isinstance(split.labels, Tensor)
        ):
            raise ConfigError(
                f"{name} set: must be a Split(images, labels) of two tensors, got "
                f"{types_of(split)}. torch.from_numpy makes a tensor of an array."
            )
        images, labels = tuple(split.images.shape), tuple(split.labels.shape)
        if len(images) != 4 or len(labels) != 1 or images[0] != labels[0] or not labels[0]:
            raise ConfigError(
                f"{name} set: must hold images (N, C, H, W) and labels (N,) with N >= 1, got "
                f"{images} and {labels}. Other data come as a Splits of data sets, and for other targets "
                "there is task.name."
            )
        if split.labels.is_floating_point() or split.labels.is_complex():
            raise ConfigError(
                f"{name} set: labels must be whole numbers, got {split.labels.dtype}. They name a "
                "class."
            )
        check_labels(split.labels, num_classes, f"{name} set")
    shape = tuple(train.images.shape[1:])
    if tuple(test.images.shape[1:]) != shape:
        raise ConfigError(
            f"test set: images must have the training set's shape {shape}, got "
            f"{(*test.images.shape[1:],)}"
        )
    return Split(train.images, train.labels.long()), Split(test.images, test.labels.long())


def hold_out_indices(count: int, share: float) -> tuple[Tensor, Tensor]:
    """Cut `range(count)` in two, in ascending order; the second part is a share of it.

    Raises:
        ConfigError: one of them would be empty.
    """
    held = round(share * count)
    if not 0 < held < count:
        raise ConfigError(
            f"`data.validation` must leave samples for training and for validation, got {share} "
            f"of {count} samples"
        )
    # Not by the run's seed: seeds differ in training alone.
    order = epoch_order(count, 0, 0)
    return order[held:].sort().values, order[:held].sort().values


def types_of(value: object) -> str:
    """Name the type of a value and of its first members, for a message."""
    members = (value.images, value.labels) if isinstance(value, Split) else value
    names = []
    if isinstance(members, tuple | list):
        names = [type(member).__name__ for member in members[:3]]
    return f"{type(value).__name__}({', '.join(names)})" if names else type(value).__name__


def check_labels(labels: Tensor, num_classes: int, source: str | Path) -> None:
    """Refuse labels outside 0..num_classes-1; `source` begins the message."""
    wrong = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise ConfigError(
            f"{source}: labels must be from 0 to {num_classes - 1}, got {int(labels[first])} for "
            f"sample {first}"
        )


def _measure(images: Tensor) -> tuple[Tensor, Tensor]:
    """Measure mean and standard deviation of each channel: (N, C, H, W) -> (C,), (C,), float64."""
    # Some images at a time: all of them as float64 may not fit.
    chunks = images.split(1024)
    count = images.numel() / images.shape[1]
    mean = torch.stack([chunk.double().sum((0, 2, 3)) for chunk in chunks]).sum(0) / count
    # Whole numbers are added without rounding, so the figures have the same bits on any number of
    # threads.
    pivot = mean if images.is_floating_point() else mean.round()
    deviations = (chunk.double() - pivot[:, None, None] for chunk in chunks)
    squares = torch.stack([deviation.square().sum((0, 2, 3)) for deviation in deviations]).sum(0)
    std = (squares / count - (mean - pivot).square()).sqrt()
    is_constant = images.amin((0, 2, 3)) == images.amax((0, 2, 3))
    return mean, torch.where(is_constant, 1, std)
