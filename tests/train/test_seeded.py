"""Samples with random numbers of their own: what they may depend on, and errors in reading one."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from syncnorm.errors import ConfigError
from syncnorm.train.data.batches import Collate, ReadFailure
from syncnorm.train.data.seeded import Key, Seeded, sample_seed

from .samples import Given, Noise

COUNT = 12


def keys(epoch: int = 3) -> list[Key]:
    return [(index, epoch) for index in range(COUNT)]


def read(seed: int = 0, epoch: int = 3) -> torch.Tensor:
    """All samples (12, 9), of a data set made anew."""
    data = Seeded(Noise(COUNT), seed)
    return torch.stack([data[key] for key in keys(epoch)])


@given(order=st.permutations(range(COUNT)))
def test_a_sample_is_the_same_in_any_order(order):
    whole, data = read(), Seeded(Noise(COUNT), 0)
    assert torch.equal(torch.stack([data[index, 3] for index in order]), whole[list(order)])


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("chunk", [1, 5])
def test_a_sample_is_the_same_from_any_number_of_loader_processes(workers, chunk):
    batches = [keys()[start : start + chunk] for start in range(0, COUNT, chunk)]
    loader = DataLoader(Seeded(Noise(COUNT), 0), batch_sampler=batches, num_workers=workers)
    assert torch.equal(torch.cat(list(loader)), read())


def test_each_number_depends_on_seed_epoch_and_sample():
    numbers = torch.cat([read(), read(epoch=4), read(seed=1)])[:, 1:]  # (36, 8)
    for column in numbers.T:
        assert len(column.unique()) == len(column)
    # And the sources of one sample do not draw the same.
    assert len(numbers.unique()) == numbers.numel()


def test_seeds_differ_in_every_part():
    seeds = [
        sample_seed(seed, epoch, index)
        for seed in (0, 1, 2**62)
        for epoch in (0, 1, 12)
        for index in (0, 1, 12, 2**40)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_reading_leaves_the_random_numbers_of_training_alone():
    data = Seeded(Given(1, ValueError("no")), 0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    data[0, 1], data[1, 1], Seeded(Noise(), 0)[3, 1]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2][1])  # pyright: ignore


class OneForAll:
    """A generator in MONAI's way: of the class, until an object is given its own."""

    R = np.random.RandomState()

    def set_random_state(self, seed=None, state=None):
        self.R = np.random.RandomState(seed)

    def __getitem__(self, index):
        return self.R.rand()

    def __len__(self):
        return 2


def test_an_object_that_seeds_itself_is_asked_to():
    first, again = (Seeded(OneForAll(), 0) for _ in range(2))
    assert first[1, 1] == again[1, 1] != first[1, 2]


class Unreadable(Exception):
    """An exception that cannot be made of one message, as torch's loader would."""

    def __init__(self, path, line):
        super().__init__(f"{path} breaks off in line {line}")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_reading_names_key_sample_and_cause(workers):
    data = Seeded(Given(1, 2, Unreadable("a.bin", 7)), 0)
    loader = DataLoader(
        data, batch_sampler=[[(1, 1)], [(0, 1), (2, 1)]], num_workers=workers, collate_fn=Collate()
    )
    good, bad = loader
    assert good.item() == 2
    assert isinstance(bad, ReadFailure)
    assert bad.message == (
        "`data.name` must give every sample, but sample 2 of train failed: Unreadable: a.bin breaks "
        "off in line 7"
    )


def test_an_error_of_ours_stays_as_it_is_worded():
    failed = Seeded(Given(ConfigError("x.png: must be an image")), 0)[0, 1]
    assert failed.message.endswith("sample 0 of train failed: x.png: must be an image")
