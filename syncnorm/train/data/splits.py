"""Data sets of a run that do not lie in memory as tensors: any map-style ones of torch's kind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset


@dataclass(frozen=True)
class Splits:
    """Map-style data sets for training, for testing and, perhaps, for validation.

    Each has `__len__` and `__getitem__(index)`, which returns a sample: a pair (input, target), a
    mapping, or whatever `collate` and the task take. A sample may be changed at random in
    `__getitem__`: random numbers are seeded there by (seed, epoch, index), so a sample's changes do
    not depend on the worker, the loader process or a resumption.

    Args:
        train: the training set.
        test: the test set; None: there is none.
        validation: the validation set; None: `data.validation` may cut one off the training set.
        num_classes: of the targets, for the model; None where that means nothing.
        in_channels: of the inputs, for the model; None where that means nothing.
        collate: makes a batch of a list of samples; None: torch's default_collate.
    """

    train: Dataset[Any]
    test: Dataset[Any] | None = None
    validation: Dataset[Any] | None = None
    num_classes: int | None = None
    in_channels: int | None = None
    collate: Callable[[Sequence[Any]], Any] | None = None
