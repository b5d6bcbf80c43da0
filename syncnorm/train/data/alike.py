"""A check that all workers have the same data: each makes its own, of files or by a program."""

import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncnorm.errors import ConfigError
from syncnorm.train.data.batches import leaves
from syncnorm.train.data.feed import TEST, TRAIN, VALIDATION, Feed
from syncnorm.train.placement import Workers
from syncnorm.train.waiting import from_all

# Machines may read an image to other last bits.
_TOLERANCE = 1e-3
_NAMES = {TRAIN: "training", VALIDATION: "validation", TEST: "test"}


class _Print(NamedTuple):
    """What is left of a tensor or a number, to be compared."""

    size: int
    mean: float
    projection: float
    """The mean of the values times numbers, so that their order counts."""
    spread: float
    """The root of their mean square."""

    def is_like(self, other: "_Print") -> bool:
        room = _TOLERANCE * max(self.spread, other.spread)
        return (
            self.size == other.size
            and abs(self.mean - other.mean) <= room
            and abs(self.projection - other.projection) <= room
        )


_Prints = list[_Print] | None
"""Of the parts of a sample; None if it cannot be read, which the run says when it comes to it."""


def check_alike(feed: Feed, workers: Workers) -> None:
    """Check that the workers have the same sizes, labels, and, of each split, one same sample.

    A sample that is another one whenever it is read is not compared. *Collectives*: one
    all_gather_object, two where samples differ; every worker must call.

    Raises:
        ConfigError: they differ; on all workers.
    """
    if workers.world_size == 1:
        return
    facts = {f"{name} samples": feed.sizes.get(split) for split, name in _NAMES.items()}
    facts |= {"classes": feed.num_classes, "channels": feed.in_channels}
    read = {split: _read(feed, split) for split in feed.sizes}
    everyone = from_all((facts, _checksum(feed.labels), read))
    first_facts, first_checksum, first_read = everyone[0]
    for rank, (other, checksum, _) in enumerate(everyone):
        for what, number in first_facts.items():
            if other[what] != number:
                raise _refusal(f"{number} {what} on rank 0 and {other[what]} on rank {rank}")
        if checksum != first_checksum:
            raise _refusal(f"other training labels on rank {rank} than on rank 0")
    differ = {
        (rank, split)
        for rank, (_, _, other) in enumerate(everyone)
        for split in read
        if not _are_alike(other[split], first_read[split])
    }
    if not differ:
        return
    # The same seed gives a sample the same changes, unless it draws them from elsewhere.
    again = {split: _read(feed, split) for _, split in sorted(differ)}
    repeats = from_all({split: _are_alike(read[split], again[split]) for split in again})
    for rank, split in sorted(differ):
        if all(each[split] for each in repeats):
            raise _refusal(
                f"another sample {_middle(feed, split)} of the {_NAMES[split]} set on rank {rank} "
                "than on rank 0"
            )


def _refusal(what: str) -> ConfigError:
    return ConfigError(
        f"`data.name` must give the same data on all workers, got {what}. Each worker makes its "
        "data sets for itself: seed what they draw, and sort lists of files."
    )


def _middle(feed: Feed, split: str) -> int:
    return feed.sizes[split] // 2


def _read(feed: Feed, split: str) -> _Prints:
    try:
        sample = feed.load(split, torch.tensor([_middle(feed, split)], device=feed.index_device))
    except ConfigError:
        return None
    return [_print_of(leaf) for leaf in leaves(sample) if _has_print(leaf)]


def _checksum(labels: Tensor | None) -> int | None:
    return None if labels is None else zlib.crc32(labels.cpu().numpy().tobytes())


def _has_print(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.layout == torch.strided and not leaf.is_complex() and leaf.numel() > 0
    # Not texts: the path of a file may be another on each machine.
    return isinstance(leaf, bool | int | float)


def _print_of(leaf: Any) -> _Print:
    values = torch.as_tensor(leaf, dtype=torch.float64, device="cpu").flatten().nan_to_num(0.0)
    weights = torch.arange(1, len(values) + 1, dtype=torch.float64, device="cpu").cos()
    mean, projection, square = (t.mean().item() for t in (values, values * weights, values**2))
    return _Print(len(values), mean, projection, square**0.5)


def _are_alike(a: _Prints, b: _Prints) -> bool:
    """True too where one is not known."""
    if a is None or b is None:
        return True
    return len(a) == len(b) and all(x.is_like(y) for x, y in zip(a, b, strict=True))
