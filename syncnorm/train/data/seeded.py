"""Samples whose random changes depend on (seed, epoch, index) alone."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch.utils.data import Dataset, get_worker_info

from syncnorm import rng
from syncnorm.errors import ConfigError, in_one_line
from syncnorm.train.data.batches import ReadFailure
from syncnorm.train.data.classes import Classes
from syncnorm.train.data.generators import generators_in, seed_generators
from syncnorm.train.data.splits import Part

# The number of a sample and the epoch; 0 in an evaluation.
Key = tuple[int, int]


class Seeded(Dataset[Any]):
    """A map-style data set whose samples are read with random numbers of their own.

    torch's, Python's and numpy's random numbers are seeded before a sample is read and, where
    training draws from them, put back afterwards. Generators that the data set or
    its transforms keep are seeded, too, as far as `generators_in` finds them when this is made.

    An error becomes a `ReadFailure`, which travels from a loader's process as a value.

    Args:
        data: takes an index.
        seed: of the run.
        split: its name, for errors.
        classes: that targets may name, if they are known.
    """

    def __init__(
        self, data: Any, seed: int, split: str = "train", classes: Classes | None = None
    ) -> None:
        self._data, self._seed, self._split, self._classes = data, seed, split, classes
        self._generators = generators_in(data)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, key: Key) -> Any:
        index, epoch = key
        seed = sample_seed(self._seed, epoch, index)
        with _seeded(seed):
            try:
                seed_generators(self._generators, seed)
                sample = self._data[index]
                if self._classes is not None:
                    self._classes.check(sample)
                return sample
            except Exception as error:  # a data set of the user's may raise anything
                return self.failure(index, error)

    def failure(self, index: int, error: Exception) -> ReadFailure:
        """Say which sample failed, and why."""
        split = self._split
        if isinstance(self._data, Part):  # of the training set, which the user knows as a whole
            split, index = "train", self._data.number(index)
        is_ours = isinstance(error, ConfigError)
        cause = " ".join(str(error).split()) if is_ours else in_one_line(error)
        return ReadFailure(
            f"`data.name` must give every sample, but sample {index} of {split} failed: {cause}"
        )


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Hash the three to 63 bits."""
    digest = hashlib.sha256(f"sample/{seed}/{epoch}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the random numbers of the CPU, and put them back at the end.

    In a loader's process nobody else draws from them, and they stay as they are then.
    """
    is_loader = get_worker_info() is not None
    with nullcontext() if is_loader else rng.kept(devices=False):
        rng.seed_all(seed, devices=False)
        yield
