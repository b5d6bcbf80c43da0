"""The order of the samples, shards, and the placement of a step."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from syncnorm.placement import (
    epoch_order,
    largest_part,
    norm_batches,
    place,
    place_local,
    shard,
    size,
)


def samples(part: slice) -> set[int]:
    return set(range(part.start, part.stop))


@given(count=st.integers(0, 200), world_size=st.integers(1, 9))
def test_shards_are_contiguous_and_nearly_equal(count, world_size):
    shards = [shard(count, rank, world_size) for rank in range(world_size)]
    assert shards[0].start == 0
    assert shards[-1].stop == count
    assert all(left.stop == right.start for left, right in itertools.pairwise(shards))
    sizes = [part.stop - part.start for part in shards]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(count=st.integers(0, 100), seed=st.integers(0, 2**63 - 1), epoch=st.integers(1, 9))
def test_every_sample_is_used_once_in_an_epoch(count, seed, epoch):
    assert torch.equal(epoch_order(count, seed, epoch).sort().values, torch.arange(count))


def test_the_order_follows_from_seed_and_epoch_alone():
    torch.manual_seed(1)
    first = epoch_order(50, seed=0, epoch=1)
    torch.manual_seed(2)
    assert torch.equal(first, epoch_order(50, seed=0, epoch=1))
    others = [
        epoch_order(50, seed=1, epoch=1),
        epoch_order(50, seed=0, epoch=2),
        epoch_order(50, seed=1, epoch=0),
    ]
    assert not any(torch.equal(first, other) for other in others)
    assert not torch.equal(others[0], others[1])


@given(count=st.integers(1, 60), norm_batch=st.integers(1, 60), world_size=st.integers(1, 7))
def test_every_statistic_is_whole_and_every_sample_is_computed_once(count, norm_batch, world_size):
    statistics = norm_batches(count, norm_batch)
    assert all(1 <= size(one) <= norm_batch for one in statistics)
    assert max(map(size, statistics)) - min(map(size, statistics)) <= 1
    placements = [place(count, norm_batch, rank, world_size, None) for rank in range(world_size)]
    (shared_by,) = {placement.shared_by for placement in placements}

    seen: list[int] = []
    for start in range(0, world_size, shared_by):
        run = [
            list(itertools.chain(*placement.rounds))
            for placement in placements[start : start + shared_by]
        ]
        # The workers of a run have parts of the same statistics, in the same order.
        for parts in zip(*run, strict=True):
            together = sorted(set().union(*map(samples, parts)))
            assert together in [sorted(samples(one)) for one in statistics]
            assert len(together) == sum(map(size, parts))
            seen += together
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize(
    ("statistics", "world_size", "shared_by", "rounds"),
    [
        (8, 1, 1, [8]),  # whole groups inside the only worker
        (8, 2, 1, [4, 4]),
        (8, 3, 1, [3, 3, 2]),
        (2, 4, 2, [1, 1, 1, 1]),  # each group over two workers
        (1, 3, 3, [1, 1, 1]),
        (2, 3, 3, [2, 2, 2]),  # all workers pool each group in turn
    ],
)
def test_where_statistics_are(statistics, world_size, shared_by, rounds):
    placements = [place(8 * statistics, 8, rank, world_size, 8) for rank in range(world_size)]
    assert {placement.shared_by for placement in placements} == {shared_by}
    # With micro-batches of one statistic there are as many rounds as statistics, unless shares of
    # several fit into one.
    parts = [sum(map(len, placement.rounds)) for placement in placements]
    assert parts == rounds


def test_side_by_side_or_one_after_the_other():
    assert [len(parts) for parts in place(64, 8, 0, 1, None).rounds] == [8]
    assert [len(parts) for parts in place(64, 8, 0, 1, 8).rounds] == [1] * 8
    assert [len(parts) for parts in place(64, 8, 0, 1, 23).rounds] == [2] * 4
    # Shared by three workers, 2 or 3 samples each: 3 fit together with 3 others, on all workers
    # alike.
    for rank in range(3):
        assert [len(parts) for parts in place(16, 8, rank, 3, 6).rounds] == [2]
        assert [len(parts) for parts in place(16, 8, rank, 3, 5).rounds] == [1, 1]


@given(
    count=st.integers(0, 60),
    world_size=st.integers(1, 7),
    micro_batch=st.none() | st.integers(1, 20),
)
def test_local_rounds_are_as_many_on_each_worker_and_small_enough(count, world_size, micro_batch):
    placements = [place_local(count, rank, world_size, micro_batch) for rank in range(world_size)]
    assert len({len(placement.rounds) for placement in placements}) == 1
    parts = [part for placement in placements for (part,) in placement.rounds]
    assert sorted(sample for part in parts for sample in samples(part)) == list(range(count))
    if micro_batch is not None:
        assert max(map(size, parts)) <= micro_batch


@given(
    count=st.integers(1, 60),
    norm_batch=st.integers(1, 60),
    world_size=st.integers(1, 7),
    spare=st.integers(0, 20),
)
def test_no_forward_is_larger_than_allowed(count, norm_batch, world_size, spare):
    least = largest_part(count, norm_batch, world_size)
    placements = [
        place(count, norm_batch, rank, world_size, least + spare) for rank in range(world_size)
    ]
    forwards = [parts for placement in placements for parts in placement.rounds]
    assert max(sum(map(size, parts)) for parts in forwards) <= least + spare
    # The least there is: some worker has as many of one statistic.
    assert max(size(part) for parts in forwards for part in parts) == least
