"""Arrays of numpy: of one .npz in memory, or of .npy files that stay on disk."""

import logging
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from syncnorm.errors import ConfigError
from syncnorm.train.config.section import Finite
from syncnorm.train.data.inputs import Inputs, exact_type
from syncnorm.train.data.sources.files import check_not_empty, choose_splits, list_folder
from syncnorm.train.data.sources.options import Classes, source
from syncnorm.train.data.splits import Splits

# Rows of the training set that mean and std are measured from.
_MEASURED = 4096
# What has more is no number of a class, but a key of some kind.
_MOST_CLASSES = 10**7
_log = logging.getLogger(__name__)


class Mapped:
    """An array of a .npy file, of which only what is looked at is read.

    Where it goes to another process it is opened anew: numpy would send its content.
    """

    array: Any

    def __init__(self, path: Path) -> None:
        self._path = path
        self.array = _read(path, "r")

    def __getstate__(self) -> Path:
        return self._path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)


class ArrayPairs(Dataset[tuple[Tensor, Tensor]]):
    """Rows of x, standardised, and of y.

    Args:
        x: has an array (N, ...) of numbers.
        y: has an array (N, ...): whole numbers become int64, others floating.
        mean: float64, against a row of x.
        std: as above.
    """

    def __init__(self, x: Any, y: Any, mean: Tensor, std: Tensor) -> None:
        self._x, self._y = x, y
        self._dtype, raw = _floating_type(x.array), _torch_type(x.array)
        self._exact = exact_type(raw, self._dtype)
        self._mean, self._std = mean.to(self._exact), std.to(self._exact)

    def __len__(self) -> int:
        return len(self._x.array)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = (row(self._x.array[index], self._exact) - self._mean) / self._std
        return x.to(self._dtype), row(self._y.array[index], _target_type(self._y.array))


class _InMemory:
    def __init__(self, array: Any) -> None:
        self.array = array


@source
def npz(
    root: Path,
    *,
    num_classes: Classes | None = None,
    mean: list[Finite] | None = None,
    std: list[Finite] | None = None,
) -> Splits:
    """Read x_train, y_train and, perhaps, x_test, y_test, x_validation, y_validation of an .npz.

    All is read into the memory of each worker. x is standardised for each channel, its second
    dimension.

    Args:
        root: the file, or a folder that holds one .npz.
        num_classes: None: the highest class of y_train, and one, where y has a class for each row;
            the number of its columns where y is floating.
        mean: of each channel; None: measured from 4,096 rows of x_train, evenly spaced.
        std: as above.

    Raises:
        ConfigError: an array is missing, no array of numbers, not finite or of another length.
    """
    path = root
    if root.is_dir():
        names = [name for name in list_folder(root, is_folder=False) if name.endswith(".npz")]
        if len(names) != 1:
            raise ConfigError(
                f"`data.root` must be an .npz file, or a folder with one, got {len(names)} in "
                f"{str(root)!r}"
            )
        path = root / names[0]
    archive = _read(path, None)
    if not hasattr(archive, "files"):
        raise ConfigError(f"{path}: must be an .npz of several arrays, got a single array")

    def read(name: str) -> Any:
        try:
            array = archive[name]
        except Exception as error:
            raise ConfigError(f"{path}: {name} must be an array of numbers: {error}") from None
        if array.dtype.kind == "f" and not _is_finite(array):
            raise ConfigError(f"{path}: {name} must be finite, got nan or inf")
        return _InMemory(array)

    with archive:
        return _make_splits(path, set(archive.files), read, num_classes, mean, std)


@source
def npy(
    root: Path,
    *,
    num_classes: Classes | None = None,
    mean: list[Finite] | None = None,
    std: list[Finite] | None = None,
) -> Splits:
    """Open x_train.npy, y_train.npy and, perhaps, those of test and validation.

    They stay on disk, and each row is read as it is needed. Otherwise as `npz`.

    Args:
        root: the folder.
        num_classes: see `npz`.
        mean: see `npz`.
        std: see `npz`.

    Raises:
        ConfigError: a file is missing, no array of numbers or of another length.
    """
    names = {
        name.removesuffix(".npy")
        for name in list_folder(root, is_folder=False)
        if name.endswith(".npy")
    }
    return _make_splits(
        root, names, lambda name: Mapped(root / f"{name}.npy"), num_classes, mean, std
    )


def _read(path: Path, mmap_mode: Any) -> Any:
    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    # A damaged file may raise anything: ValueError, EOFError, zipfile.BadZipFile.
    except Exception as error:
        raise ConfigError(f"{path}: must be arrays that numpy can read: {error}") from None


def _make_splits(
    path: Path,
    names: set[str],
    read: Callable[[str], Any],
    num_classes: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Splits:
    pairs: dict[str, tuple[Any, Any]] = {}
    present = {name[2:] for name in names if name.startswith(("x_", "y_"))}
    for split, suffix in {
        "train": "train",
        **choose_splits(present, "pair of arrays", path),
    }.items():
        missing = sorted({f"x_{suffix}", f"y_{suffix}"} - names)
        if missing:
            raise ConfigError(
                f"`data.root` must hold {missing[0]}, got {str(path)!r} with "
                f"{', '.join(sorted(names)) or 'no array'}"
            )
        pairs[split] = read(f"x_{suffix}"), read(f"y_{suffix}")
    first_x, first_y = (each.array for each in pairs["train"])
    for split, (x, y) in pairs.items():
        _check(path, split, x.array, y.array, first_x, first_y)
    classes = _count_classes(path, {split: y.array for split, (_, y) in pairs.items()}, num_classes)
    figures = _figures(path, first_x, mean, std)
    sets: dict[str, Any] = {split: ArrayPairs(x, y, *figures) for split, (x, y) in pairs.items()}
    inputs = Inputs(
        shape=first_x.shape[1:],
        dtype=str(_torch_type(first_x)).removeprefix("torch."),
        mean=tuple(figures[0].flatten().tolist()),
        std=tuple(figures[1].flatten().tolist()),
    )
    has_labels = first_y.ndim == 1 and first_y.dtype.kind != "f"
    return Splits(
        **sets,
        num_classes=classes,
        in_channels=first_x.shape[1],
        inputs=inputs,
        labels=first_y.astype("int64") if has_labels else None,
    )


def _check(path: Path, split: str, x: Any, y: Any, first_x: Any, first_y: Any) -> None:
    for name, array in (("x", x), ("y", y)):
        if array.dtype.kind not in "biuf":
            raise ConfigError(
                f"{path}: {name} of {split} must be numbers, got {array.dtype}. Number the classes."
            )
    if x.ndim < 2 or y.ndim < 1 or len(x) != len(y):
        raise ConfigError(
            f"{path}: {split} must have x (N, C, ...) and y (N, ...), got {x.shape} and {y.shape}"
        )
    check_not_empty(split, len(x), repr(str(path)))
    for name, array, first in (("x", x, first_x), ("y", y, first_y)):
        if array.shape[1:] != first.shape[1:] or (array.dtype.kind == "f") != (
            first.dtype.kind == "f"
        ):
            raise ConfigError(
                f"{path}: {name} of {split} must be like that of train, {first.dtype} "
                f"(N, {', '.join(map(str, first.shape[1:]))}), got {array.dtype} {array.shape}"
            )


def _count_classes(path: Path, targets: dict[str, Any], wanted: int | None) -> int | None:
    first = targets["train"]
    if first.dtype.kind == "f":
        if wanted is not None or first.ndim > 2:
            return wanted
        return 1 if first.ndim == 1 else first.shape[1]
    if wanted is None and first.ndim > 1:
        if first.shape[1:] == (1,):
            _log.warning("%s: y has the shape (N, 1); one class for each sample is (N,)", path)
        return None
    count = int(first.max()) + 1 if wanted is None else wanted
    if count > _MOST_CLASSES:
        raise ConfigError(
            f"{path}: y of train must number the classes from 0, got {int(first.max())} for sample "
            f"{int(first.argmax())}. Number them anew, or give data.options.num_classes."
        )
    if first.ndim == 1:  # more dimensions may hold 255 for none
        for split, y in targets.items():
            if y.min() < 0 or y.max() >= count:
                first = int(((y < 0) | (y >= count)).argmax())
                raise ConfigError(
                    f"{path}: y of {split} must be from 0 to {count - 1}, got {int(y[first])} for "
                    f"sample {first}"
                )
    return count


def _figures(
    path: Path, x: Any, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Tensor, Tensor]:
    """Give mean and standard deviation of each channel, to be set against a row of x."""
    rest = (1,) * (x.ndim - 2)
    found: list[Tensor] = []
    if mean is None or std is None:
        some = row(x[:: -(-len(x) // _MEASURED)], torch.float64)
        others = (0, *range(2, x.ndim))
        found = [*mean_and_std(some, others)]
        if not torch.stack(found).isfinite().all():
            raise ConfigError(f"{path}: x of train must be finite, got nan or inf")
    for number, (name, values) in enumerate((("mean", mean), ("std", std))):
        if values is None:
            continue
        if len(values) != x.shape[1] or (name == "std" and min(values) <= 0):
            raise ConfigError(
                f"`data.options.{name}` must have a value for each of {x.shape[1]} channels"
                f"{', greater than 0' if name == 'std' else ''}, got {reprlib.repr(values)}"
            )
        found[number : number + 1] = [torch.tensor(values, dtype=torch.float64)]
    return found[0].reshape(-1, *rest), found[1].reshape(-1, *rest)


def mean_and_std(values: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Compute mean and biased standard deviation over `dims`; the latter is 1 of a constant."""
    mean, std = values.mean(dims), values.std(dims, correction=0)
    if values.numel():
        # Where the mean of a constant is rounded, std is a rounding error.
        is_constant = values.amax(dims) == values.amin(dims)
        std = torch.where(is_constant | (std == 0), 1, std)
    return mean, std


def row(values: Any, dtype: torch.dtype) -> Tensor:
    """Copy a part of an array of numbers into a tensor."""
    kinds = {torch.float32: "f4", torch.float64: "f8", torch.int64: "i8"}
    return torch.from_numpy(np.array(values, dtype=kinds[dtype]))


def _floating_type(array: Any) -> torch.dtype:
    return torch.float64 if array.dtype.kind == "f" and array.itemsize == 8 else torch.float32


def _torch_type(array: Any) -> torch.dtype:
    """Torch's type of an array's name; float32 for what torch has not."""
    return getattr(torch, array.dtype.name, torch.float32)


def _target_type(array: Any) -> torch.dtype:
    return _floating_type(array) if array.dtype.kind == "f" else torch.int64


def _is_finite(array: Any) -> bool:
    # The sum of what is finite may overflow; the extremes tell without a copy.
    return bool(array.size == 0 or np.isfinite([array.min(), array.max()]).all())
