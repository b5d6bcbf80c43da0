"""Pools of ranks, one per world size, kept for the whole test run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from syncnorm.testing import RankPool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], RankPool]]:
    """pool(world_size): a live RankPool; started anew if a failure has ended it."""
    pools: dict[int, RankPool] = {}

    def get(world_size: int) -> RankPool:
        if world_size not in pools or not pools[world_size].is_alive:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield get
    for each in pools.values():
        each.close()
