"""Data sets in memory, and how a global batch is cut for the workers.

Which samples form a step follows from (seed, epoch) and the size of the global batch alone; the number of
workers decides only who computes which of them. Every sample of an epoch is used exactly once, on any number
of workers.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) and their labels (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Split":
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device, dtype: torch.dtype) -> "Split":
        """Move to a device; the dtype is that of the images."""
        return Split(self.images.to(device, dtype), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A training set, a test set and the number of classes."""

    train: Split
    test: Split
    num_classes: int


def digits() -> Dataset:
    """Load scikit-learn's handwritten digits: 1,797 images of 1x8x8, 1,437 to train and 360 to test.

    The split is stratified and always the same, so that seeds differ in training alone. Pixels are
    standardised with the mean and the standard deviation of the training set.
    """
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    pixels = (pixels - pixels[train].mean()) / pixels[train].std()
    everything = Split(torch.from_numpy(pixels).reshape(-1, 1, 8, 8), torch.from_numpy(labels).long())
    return Dataset(everything[torch.from_numpy(train)], everything[torch.from_numpy(test)], num_classes=10)


DATASETS: dict[str, Callable[[], Dataset]] = {"digits": digits}


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Permute `range(count)` by (seed, epoch) alone."""
    # A hash keeps the streams of neighbouring seeds and epochs apart; seed + epoch would make them overlap.
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(count, generator=generator)


def shard(count: int, rank: int, world_size: int) -> slice:
    """Cut `range(count)` into contiguous shards that differ in size by at most 1; the last may be empty."""
    size, longer = divmod(count, world_size)
    start = rank * size + min(rank, longer)
    return slice(start, start + size + (rank < longer))


def local_batches(split: Split, order: Tensor, global_batch: int, rank: int, world_size: int) -> Iterator[Split]:
    """Yield this worker's shard of every global batch, the last and shorter one included.

    All workers get equally many shards, some of them perhaps empty.
    """
    for batch in order.split(global_batch):
        yield split[batch[shard(len(batch), rank, world_size)].to(split.labels.device)]
