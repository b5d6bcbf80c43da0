"""Ranks with a device each, over NCCL; where there is one device, one rank."""

from __future__ import annotations

import pytest
import torch

from tests.cuda import scenarios
from tests.distributed.steps import Batch

pytestmark = pytest.mark.cuda

SYNCS = ["batch", "running", "lagged", "none"]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("sync", SYNCS)
def test_training(equal_on_both, sync, number):
    equal_on_both(number, scenarios.train, "norm", sync, backend="nccl")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(5, 3), (8, 0)], ids=str)
def test_uneven_shards_are_the_whole_batch(ranks, device, sizes, dtype):
    batches = [Batch.random((8, 5, 6, 7), dtype, masked=True, seed=seed) for seed in range(2)]
    scenarios.check_layer(ranks(2, "nccl"), device, batches, sizes, {"bounds": (1.25, 0.25)})


@pytest.mark.parametrize("sync", SYNCS)
def test_many_layers_whose_messages_cross_those_of_the_gradients(ranks, device, sync):
    losses = ranks(2, "nccl").run(scenarios.deep_training, device, sync)
    assert all(torch.isfinite(each).all() for each in losses)
