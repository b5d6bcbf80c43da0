"""Which samples a step consists of, and who computes them."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from syncnorm.train.data import Split, digits, epoch_order, local_batches, shard


@given(count=st.integers(0, 200), world_size=st.integers(1, 9))
def test_shards_are_contiguous_and_nearly_equal(count, world_size):
    shards = [shard(count, rank, world_size) for rank in range(world_size)]
    assert shards[0].start == 0
    assert shards[-1].stop == count
    assert all(left.stop == right.start for left, right in itertools.pairwise(shards))
    sizes = [part.stop - part.start for part in shards]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(
    count=st.integers(1, 100), global_batch=st.integers(1, 120), world_size=st.integers(1, 7), epoch=st.integers(1, 9)
)
def test_every_sample_is_used_once_in_an_order_that_ignores_the_workers(count, global_batch, world_size, epoch):
    numbers = torch.arange(count)
    split = Split(numbers.reshape(-1, 1, 1, 1).double(), numbers)
    order = epoch_order(count, seed=3, epoch=epoch)
    by_rank = [list(local_batches(split, order, global_batch, rank, world_size)) for rank in range(world_size)]
    steps = [torch.cat([part.labels for part in parts]) for parts in zip(*by_rank, strict=True)]
    assert torch.equal(torch.cat(steps), order)
    assert all(len(step) == global_batch for step in steps[:-1])
    assert torch.equal(torch.cat(steps).sort().values, numbers)
    for batches in by_rank:
        for batch in batches:
            assert torch.equal(batch.images.flatten().long(), batch.labels)


def test_the_order_follows_from_seed_and_epoch_alone():
    torch.manual_seed(1)
    first = epoch_order(50, seed=0, epoch=1)
    torch.manual_seed(2)
    assert torch.equal(first, epoch_order(50, seed=0, epoch=1))
    others = [epoch_order(50, seed=1, epoch=1), epoch_order(50, seed=0, epoch=2), epoch_order(50, seed=1, epoch=0)]
    assert not any(torch.equal(first, other) for other in others)
    assert not torch.equal(others[0], others[1])


def test_digits():
    data = digits()
    assert data.train.images.shape == (1437, 1, 8, 8)
    assert data.test.images.shape == (360, 1, 8, 8)
    assert data.num_classes == 10
    assert data.train.images.mean().item() == pytest.approx(0, abs=1e-12)
    assert data.train.images.std(correction=0).item() == pytest.approx(1)
    shares = [part.labels.bincount(minlength=10) / len(part) for part in (data.train, data.test)]
    assert torch.allclose(shares[0], shares[1], atol=3e-3)


def test_digits_are_split_the_same_way_each_time():
    assert torch.equal(digits().test.images, digits().test.images)
