"""A check that all workers have the same data: each makes its own, of files or by a program."""

import logging
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncnorm.errors import ConfigError
from syncnorm.train.data.batches import leaves
from syncnorm.train.data.feed import TEST, TRAIN, VALIDATION, Feed, labels_checksum
from syncnorm.train.waiting import from_all
from syncnorm.train.workers import Workers

_log = logging.getLogger(__name__)

# Of a large tensor so many values are compared.
_MOST_VALUES = 256
# Decoders of images differ by a few levels; other samples by about a standard deviation.
_DECODERS, _LAST_BITS = 0.05, 1e-6
_NAMES = {TRAIN: "training", VALIDATION: "validation", TEST: "test"}


class _Glimpse(NamedTuple):
    """What is sent of a tensor or a number."""

    shape: tuple[int, ...]
    values: Tensor
    """Some of its values, evenly spaced, float64."""

    def is_close(self, other: "_Glimpse") -> bool:
        """True if both may be the same, read by different machines."""
        if self.shape != other.shape:
            return False
        a, b = self.values, other.values
        finite = a.isfinite() & b.isfinite()
        if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
            return False
        a, b = a[finite], b[finite]
        if not len(a):
            return True
        room = _DECODERS * a.std(correction=0) + _LAST_BITS * a.abs().max()
        return bool((a - b).square().mean().sqrt() <= room)


_Sample = list[_Glimpse] | None
"""Digest of the parts of a sample; None if it cannot be read, which the run says when it comes to it."""


def check_same_data(feed: Feed, workers: Workers) -> None:
    """Check that the workers have the same sizes, labels, and, of each split, one same sample.

    A sample that is another one whenever it is read is not compared. *Collectives*: one
    all_gather_object, two where samples differ; every worker must call.

    Raises:
        ConfigError: they differ; on all workers.
    """
    if workers.world_size == 1:
        return
    facts = {f"{name} samples": feed.sizes.get(split) for split, name in _NAMES.items()}
    model = feed.signature
    facts |= {"classes": model.num_classes, "channels": model.in_channels}
    read = {split: _read(feed, split) for split in feed.sizes}
    everyone = from_all((facts, labels_checksum(feed), read))
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
        if not _is_close(other[split], first_read[split])
    }
    if not differ:
        return
    # The same seed gives a sample the same changes, unless it draws them from elsewhere.
    again = {split: _read(feed, split) for _, split in sorted(differ)}
    repeats = from_all({split: _is_close(read[split], again[split]) for split in again})
    for rank, split in sorted(differ):
        if all(each[split] for each in repeats):
            raise _refusal(
                f"another sample {_middle(feed, split)} of the {_NAMES[split]} set on rank {rank} "
                "than on rank 0"
            )


def warn_of_own_random_numbers(feed: Feed) -> None:
    """Log it where a sample is another one each time that this worker reads it. No exchange.

    Its random changes come from numbers that are not seeded, and depend on who reads what before:
    on the workers and on loader processes.
    """
    index = torch.tensor([_middle(feed, TRAIN)], device=feed.index_device)
    try:
        batches = feed.load_each(TRAIN, [index, index], epoch=1)
    except ConfigError:  # the run says so when it comes to it
        return
    once, again = map(_glimpses, batches)
    if len(once) == len(again) and all(
        a.shape == b.shape and torch.equal(a.values.nan_to_num(), b.values.nan_to_num())
        for a, b in zip(once, again, strict=True)
    ):
        return
    _log.warning(
        "data.name: sample %d of the training set is another one each time that it is read, so the "
        "run depends on the number of workers. Let it draw torch's, numpy's or Python's own random "
        "numbers, or those of a generator that the data set keeps",
        _middle(feed, TRAIN),
    )


def _refusal(what: str) -> ConfigError:
    return ConfigError(
        f"`data.name` must give the same data on all workers, got {what}. Each worker makes its "
        "data sets for itself: seed what they draw, and sort lists of files."
    )


def _middle(feed: Feed, split: str) -> int:
    return feed.sizes[split] // 2


def _read(feed: Feed, split: str) -> _Sample:
    index = torch.tensor([_middle(feed, split)], device=feed.index_device)
    try:
        # As in training: for evaluation there may be another data set of the same samples.
        sample = feed.load(split, index, epoch=int(split == TRAIN))
    except ConfigError:
        return None
    return _glimpses(sample)


def _glimpses(sample: Any) -> list[_Glimpse]:
    return [_glimpse(leaf) for leaf in leaves(sample) if _is_compared(leaf)]


def _is_compared(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        is_plain = leaf.layout == torch.strided and not leaf.is_nested and not leaf.is_quantized
        return is_plain and not leaf.is_complex()
    # Not texts: the path of a file may be another on each machine.
    return isinstance(leaf, bool | int | float)


def _glimpse(leaf: Any) -> _Glimpse:
    if not isinstance(leaf, Tensor):
        # An integer may be larger than any float.
        leaf = torch.tensor(
            leaf if abs(leaf) < 2.0**1000 else math.inf, dtype=torch.float64, device="cpu"
        )
    number = min(leaf.numel(), _MOST_VALUES)
    chosen = torch.linspace(0, leaf.numel() - 1, number, dtype=torch.float64, device=leaf.device)
    index = torch.unravel_index(chosen.round().long(), leaf.shape)
    return _Glimpse(tuple(leaf.shape), leaf[index].flatten().to("cpu", torch.float64))


def _is_close(a: _Sample, b: _Sample) -> bool:
    """True too where one is not known."""
    if a is None or b is None:
        return True
    return len(a) == len(b) and all(x.is_close(y) for x, y in zip(a, b, strict=True))
