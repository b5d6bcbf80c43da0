"""Data sets in memory.

Images stay as they are stored, mostly as bytes, and are standardised batch by batch: every worker
holds the whole set, and as float64 it would take 8 times the memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from syncnorm.errors import ConfigError
from syncnorm.placement import epoch_order
from syncnorm.train.data.cifar import read_binary, read_python
from syncnorm.train.data.idx import read_idx
from syncnorm.train.data.inputs import exact_type
from syncnorm.train.data.paths import DataFiles


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
        """Move to a device; dtypes stay."""
        return replace(
            self,
            train=self.train.to(device),
            test=self.test.to(device),
            mean=self.mean.to(device),
            std=self.std.to(device),
            validation=None if self.validation is None else self.validation.to(device),
        )

    def standardise(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute (images - mean) / std for each channel, in `dtype`, on the device of `images`."""
        exact = exact_type(images.dtype, dtype)
        # (C, 1, 1), against images (N, C, H, W)
        mean, std = (
            value.to(images.device, exact).view(-1, 1, 1) for value in (self.mean, self.std)
        )
        return ((images.to(exact) - mean) / std).to(dtype)


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


def hold_out(data: Dataset, share: float) -> Dataset:
    """Set a share of the training set apart for validation, always the same samples.

    Raises:
        ConfigError: it leaves no sample for training or for validation.
    """
    if not share or data.validation is not None:
        return data
    kept, held = hold_out_indices(len(data.train), share)
    return replace(data, train=data.train[kept], validation=data.train[held])


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


_NUMERALS = tuple("0123456789")
_CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_THINGS = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_CIFAR = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
_CIFAR_BINARY = tuple(f"{name}.bin" for name in _CIFAR)


def _idx_files(names: Sequence[str], source: str) -> DataFiles:
    # The most specific folder first: several sets of equally named files may lie under one root.
    folders = [*(f"{name}{sub}" for sub, name in product(("/raw", ""), names)), "."]
    wanted = f"{', '.join(_IDX)}, plain or with .gz"
    return DataFiles([(folder, _IDX) for folder in folders], ("", ".gz"), wanted, source)


_MNIST_FILES = _idx_files(("mnist", "MNIST"), "They are the files of Yann LeCun's MNIST database.")
_FASHION_MNIST_FILES = _idx_files(
    ("fashion_mnist", "fashion-mnist", "FashionMNIST"),
    "Debian's package dataset-fashion-mnist installs them under /usr/share/datasets/fashion-mnist.",
)
_CIFAR10_FILES = DataFiles(
    [
        ("cifar-10-batches-bin", _CIFAR_BINARY),
        (".", _CIFAR_BINARY),
        ("cifar-10-batches-py", _CIFAR),
        (".", _CIFAR),
    ],
    ("",),
    "data_batch_1 to data_batch_5 and test_batch, all with .bin (the binary version) or all "
    "without (for Python)",
    "They are in the archives of the CIFAR-10 page of the University of Toronto.",
)


def digits(root: Path | None) -> Dataset:
    """Load handwritten digits, 1x8x8, whole numbers 0 to 16: 1,437 to train and 360 to test.

    They are scikit-learn's, from the data set of Alpaydin and Kaynak (UCI, CC BY 4.0), and come
    with this package. The split is stratified and always the same, so that seeds differ in
    training alone.

    Args:
        root: not used.
    """
    import numpy as np

    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
        everything = Split(
            torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()
        )
    return make_dataset(everything[:1437], everything[1437:], 10, _NUMERALS)


def mnist(root: Path | None) -> Dataset:
    """Load MNIST: handwritten digits, 1x28x28, 60,000 to train and 10,000 to test.

    LeCun et al. 1998, Gradient-based learning applied to document recognition.

    Args:
        root: holds the four files, or mnist, MNIST, mnist/raw or MNIST/raw with them.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    return _load_idx(_MNIST_FILES.find(root), _NUMERALS)


def fashion_mnist(root: Path | None) -> Dataset:
    """Load Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747): clothes, in the sizes of MNIST.

    Args:
        root: holds the four files, or fashion_mnist, fashion-mnist or FashionMNIST, or raw in one
            of them.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    return _load_idx(_FASHION_MNIST_FILES.find(root), _CLOTHES)


def cifar10(root: Path | None) -> Dataset:
    """Load CIFAR-10: ten kinds of things, 3x32x32, 50,000 to train and 10,000 to test.

    Krizhevsky 2009, Learning multiple layers of features from tiny images.

    Args:
        root: holds the six files of the binary or the Python version, or the folder that its
            archive unpacks to.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    paths = _CIFAR10_FILES.find(root)
    read = read_binary if paths[0].suffix == ".bin" else read_python
    splits = [Split(*read(path)) for path in paths]
    for path, split in zip(paths, splits, strict=True):
        check_labels(split.labels, 10, path)
    *train, test = splits
    joined = Split(
        torch.cat([split.images for split in train]), torch.cat([split.labels for split in train])
    )
    return make_dataset(joined, test, 10, _THINGS)


def _load_idx(paths: Sequence[Path], classes: Sequence[str]) -> Dataset:
    train_images, train_labels, test_images, test_labels = paths
    return make_dataset(
        _read_idx_split(train_images, train_labels),
        _read_idx_split(test_images, test_labels),
        10,
        classes,
    )


def _read_idx_split(images_path: Path, labels_path: Path) -> Split:
    images, labels = read_idx(images_path, ndim=3), read_idx(labels_path, ndim=1).long()
    if len(images) != len(labels):
        raise ConfigError(
            f"{labels_path}: must hold {len(images)} labels, one for each image of {images_path}, "
            f"got {len(labels)}"
        )
    check_labels(labels, 10, labels_path)
    return Split(images[:, None], labels)


DATASETS: dict[str, Callable[[Path | None], Dataset]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
}
