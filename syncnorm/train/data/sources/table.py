"""Tables of numbers, as comma-separated values."""

import csv as files
import math
import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import TensorDataset

from syncnorm.errors import ConfigError
from syncnorm.train.data.inputs import Inputs, Table
from syncnorm.train.data.sources.arrays import mean_and_std
from syncnorm.train.data.sources.files import (
    by_stem,
    check_not_empty,
    choose_splits,
    is_held_out,
    list_folder,
    tell_left_out,
)
from syncnorm.train.data.sources.options import Column, Share, source
from syncnorm.train.data.splits import Splits

# Others may be codes, such as 1e2.
_PLAIN = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?")
_LARGEST = torch.finfo(torch.float32).max
_HINT = "Fill it in, or leave columns out by data.options.drop."


@dataclass
class _Contents:
    """Features of all rows, one row after the other; and each row's target as text, and line."""

    path: Path
    features: array
    targets: list[str]
    lines: list[int]

    @classmethod
    def empty(cls, path: Path) -> "_Contents":
        return cls(path, array("d"), [], [])

    def add(self, features: Sequence[float], target: str, line: int) -> None:
        self.features.extend(features)
        self.targets.append(target)
        self.lines.append(line)


@source
def csv(
    root: Path,
    *,
    target: Column,
    kind: Literal["classify", "regress"] = "classify",
    drop: list[Column] | None = None,
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ",",
    test: Share = 0.0,
) -> Splits:
    """Read rows of numbers: root/{train,validation,test}.csv, or one file.

    Each has a first line with the names of the columns. Samples are features (F,), float32,
    standardised by the training set's mean and standard deviation (biased; of a constant column 1),
    and a class, or a number (float64; batches have it as `train.dtype`).

    Args:
        root: a file, or a folder with train.csv or with one file.
        target: name of the column with the class, a name or a number, or with the number to learn.
            Classes are numbered in the order of their numbers, else of their names.
        kind: classify or regress.
        drop: columns that are left out. All others must be numbers.
        delimiter: between two values.
        test: share of a single file that is set apart for testing, by a hash of each row: equal
            rows stay together.

    Raises:
        ConfigError: a column is missing, or a value is no finite number; names file, line, column.
    """
    paths = _find(root, test)
    target, drop = _folded(target), [_folded(name) for name in drop or []]
    columns = _columns(paths["train"], target, drop, delimiter)
    tables = {split: _read(path, columns, target, delimiter) for split, path in paths.items()}
    if test:
        tables = _cut(tables["train"], len(columns), test)
    for split, table in tables.items():
        check_not_empty(split, len(table.targets), repr(str(table.path)))
    count = len(columns)
    features = {split: _matrix(table, count) for split, table in tables.items()}
    mean, std = mean_and_std(features["train"], (0,))
    classes = _classes(tables["train"].targets) if kind == "classify" else None
    sets: dict[str, Any] = {
        split: TensorDataset(
            ((features[split] - mean) / std).float(), _targets(table, target, classes)
        )
        for split, table in tables.items()
    }
    return Splits(
        **sets,
        num_classes=len(classes) if classes else 1,
        in_channels=count,
        classes=classes,
        labels=sets["train"].tensors[1] if classes else None,
        inputs=Inputs(
            shape=(count,),
            dtype="float64",
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            table=Table(columns=tuple(columns), delimiter=delimiter),
        ),
    )


def read_features(path: Path, table: Table) -> Iterator[Tensor | ConfigError]:
    """Yield the features of each row, (F,), float64, or why a row has none.

    Args:
        path: of a file whose first line names its columns; others than the table's may hold anything.
        table: what is read.

    Raises:
        ConfigError: the file cannot be read, or lacks a column.
    """
    columns = table.columns
    for line, values in _rows(path, columns, table.delimiter):
        if isinstance(values, ConfigError):
            yield values
            continue
        try:
            yield torch.tensor(
                _numbers(values, path, line, columns, "Fill it in."), dtype=torch.float64
            )
        except ConfigError as error:
            yield error


def _find(root: Path, test: float) -> dict[str, Path]:
    if not root.is_dir():
        return {"train": root}
    tables = [name for name in list_folder(root, is_folder=False) if name.lower().endswith(".csv")]
    names = by_stem(tables, "table", root)
    stems = choose_splits(names, "table", root)
    tell_left_out(names, stems, root)
    found = {split: root / names[stem] for split, stem in stems.items()}
    if "train" not in found:
        if len(names) != 1:
            raise ConfigError(
                f"`data.root` must be a .csv file, or a folder with train.csv or with one, got "
                f"{len(names)} in {str(root)!r}"
            )
        found = {"train": root / next(iter(names.values()))}
    if test and len(found) > 1:
        raise ConfigError(
            f"`data.options.test` must be 0 where {str(root)!r} has several sets, got {test}"
        )
    return found


def _columns(path: Path, target: str, drop: Sequence[str], delimiter: str) -> list[str]:
    """Read the names of the features."""
    with _open(path) as file:
        names = _header(path, _reader(file, delimiter))
    for key, name in (("target", target), *(("drop", name) for name in drop)):
        if name not in names:
            hint = "; data.options.delimiter says what is between two" if len(names) == 1 else ""
            raise ConfigError(
                f"`data.options.{key}` must name a column of {path}, {', '.join(names)[:300]}, got "
                f"{name!r}{hint}"
            )
    columns = [name for name in names if name != target and name not in drop]
    if not columns:
        raise ConfigError(f"{path}: must have columns besides {target}, got none")
    return columns


def _read(path: Path, columns: Sequence[str], target: str, delimiter: str) -> _Contents:
    table = _Contents.empty(path)
    for line, values in _rows(path, [*columns, target], delimiter):
        if isinstance(values, ConfigError):
            raise values
        *features, of_target = values
        table.add(_numbers(features, path, line, columns, _HINT), of_target.strip(), line)
    return table


def _rows(
    path: Path, columns: Sequence[str], delimiter: str
) -> Iterator[tuple[int, list[str] | ConfigError]]:
    """Yield the line of each row, and its values of some columns, or why it has none."""
    with _open(path) as file:
        reader = _reader(file, delimiter)
        names = _header(path, reader)
        missing = [name for name in columns if name not in names]
        if missing:
            raise ConfigError(
                f"{path}: must have the columns of the training set, got none named {missing[0]!r}"
            )
        places = [names.index(name) for name in columns]
        end = reader.line_num
        for values in reader:
            line, end = end + 1, reader.line_num
            if not values:
                continue
            if len(values) == len(names):
                yield line, [values[place] for place in places]
                continue
            yield (
                line,
                ConfigError(
                    f"{path}, line {line}: must have {len(names)} values, got {len(values)}"
                ),
            )


def _reader(file: Any, delimiter: str) -> Any:
    # Strict: a quote that nobody closes would make one value of the rest of the file.
    return files.reader(file, delimiter=delimiter, strict=True)


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        # A mark at the beginning, as spreadsheets write it, is no part of the first name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, files.Error) as error:
        raise ConfigError(
            f"{path}: must be text in UTF-8 of values with a delimiter between them, and quotes "
            f"around whole ones only: {error}"
        ) from None


def _folded(name: str) -> str:
    """A name of a column in one line."""
    return " ".join(name.split())


def _header(path: Path, reader: Iterator[list[str]]) -> list[str]:
    names = [_folded(name) for name in next(reader, [])]
    if not all(names) or len(set(names)) < len(names) or not names:
        raise ConfigError(
            f"{path}: must begin with a line of different names of columns, got {str(names)[:300]}. "
            "pandas leaves the name of its index out: to_csv(..., index=False)."
        )
    return names


def _numbers(
    values: Sequence[str], path: Path, line: int, columns: Sequence[str], hint: str
) -> list[float]:
    return [
        _number(value, path, line, name, hint) for value, name in zip(values, columns, strict=True)
    ]


def _number(text: str, path: Path, line: int, column: str, hint: str) -> float:
    try:
        # Python's own numbers may be grouped, 1_000.
        value = math.nan if "_" in text else float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= _LARGEST:
        raise ConfigError(
            f"{path}, line {line}, column {column}: must be a finite number of at most "
            f"{_LARGEST:.2g}, got {text[:40]!r}. {hint}"
        )
    return value


def _cut(table: _Contents, count: int, share: float) -> dict[str, _Contents]:
    kept, held = _Contents.empty(table.path), _Contents.empty(table.path)
    for number, (target, line) in enumerate(zip(table.targets, table.lines, strict=True)):
        features = table.features[number * count : (number + 1) * count]
        part = held if is_held_out(repr((features.tolist(), target)), share) else kept
        part.add(features, target, line)
    return {"train": kept, "test": held}


def _matrix(table: _Contents, count: int) -> Tensor:
    """Make a tensor (N, F), float64, of a table's features."""
    return torch.tensor(table.features, dtype=torch.float64).reshape(-1, count)


def _classes(targets: Sequence[str]) -> list[str]:
    # By name first: the order of a set is each process's own.
    names = sorted(set(targets))
    try:
        numbers = {name: float(name) for name in names}
    except ValueError:
        return names
    if any(map(math.isnan, numbers.values())):  # there is no order of numbers with it
        return names
    names.sort(key=lambda name: numbers[name])
    for one, other in pairwise(name for name in names if _PLAIN.fullmatch(name)):
        if Decimal(one) == Decimal(other):
            raise ConfigError(
                f"`data.options.target` must name classes that differ, got {one!r} and {other!r}, "
                "which are one number. Write them alike."
            )
    return names


def _targets(table: _Contents, column: str, classes: list[str] | None) -> Tensor:
    if classes is None:
        pairs = zip(table.targets, table.lines, strict=True)
        values = [_number(text, table.path, line, column, _HINT) for text, line in pairs]
        return torch.tensor(values, dtype=torch.float64)
    numbers = {name: number for number, name in enumerate(classes)}
    for name, line in zip(table.targets, table.lines, strict=True):
        # As pandas and numpy write what is missing.
        if name not in numbers or name.casefold() in ("", "nan", "+nan", "-nan"):
            raise ConfigError(
                f"{table.path}, line {line}, column {column}: must be a class of the training set, "
                f"got {name[:40]!r}"
            )
    return torch.tensor([numbers[name] for name in table.targets])
