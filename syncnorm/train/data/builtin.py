"""The data sets that have a name: digits, MNIST, Fashion-MNIST and CIFAR-10."""

import logging
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch

from syncnorm.errors import ConfigError
from syncnorm.train.data.cifar import read_binary, read_python
from syncnorm.train.data.datasets import Dataset, Split, check_labels, make_dataset
from syncnorm.train.data.idx import read_idx
from syncnorm.train.data.paths import DataFiles

_log = logging.getLogger(__name__)

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
_THINGS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
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
        root: not used, which a line says.
    """
    if root is not None:
        _log.warning("data.root is not used: the digits come with the package")
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
