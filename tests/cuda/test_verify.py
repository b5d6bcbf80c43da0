"""All that `syncnorm verify` holds against the layers, on ranks that share a device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from syncnorm.testing import RankPool
from syncnorm.verify import LocalRunner, ours, runner, verify
from syncnorm.verify.checks import all_checks

pytestmark = pytest.mark.cuda


class OnDevice(LocalRunner):
    """Ranks that share a device."""

    def __init__(self, device: str, deadline_seconds: float) -> None:
        super().__init__(2, deadline_seconds)
        self.device = device

    def _living_pool(self) -> RankPool:
        if self._pool is None or not self._pool.is_alive:
            self._pool = RankPool(2, "gloo", 2.0 * self.deadline_seconds, self.device)
            self._pool.run(_join, self.device, self.deadline_seconds)
        return self._pool


def _join(device: str, deadline_seconds: float) -> None:
    """On a rank of the pool."""
    where = torch.device(device)
    rank, size = dist.get_rank(), dist.get_world_size()
    runner._context = runner.join(rank, size, where, "127.0.0.1", deadline_seconds)


@pytest.fixture(scope="module")
def on_device(device) -> Iterator[OnDevice]:
    with OnDevice(device, 60.0) as made:
        yield made


@pytest.mark.parametrize("layer", ours(), ids=lambda layer: layer.name)
@pytest.mark.parametrize("name", all_checks())
def test_check(on_device, name, layer):
    (result,) = verify(on_device, [layer], only=[name]).results
    if result.status == "not offered":
        pytest.skip(result.reason)
    assert result.status == "passed", result.reason
