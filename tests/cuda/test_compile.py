"""Compiled layers on the device, with Triton code that inductor writes, against the oracle."""

from __future__ import annotations

import pytest
import torch

from syncnorm.testing import RankPool
from tests.cuda import scenarios
from tests.distributed.steps import Batch, check_against_oracle

pytestmark = pytest.mark.cuda

COMPILING_SECONDS = 120.0


@pytest.fixture
def ranks(ranks):
    """Ranks that are given time to compile."""

    def get(number: int, backend: str = "gloo") -> RankPool:
        pool = ranks(number, backend)
        pool.timeout_seconds = COMPILING_SECONDS
        return pool

    return get


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("options", [{}, {"bounds": (1.25, 0.25)}], ids=["norm", "renorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", [1, 2], ids=["alone", "two ranks"])
def test_a_compiled_layer(ranks, device, number, dtype, options, masked):
    sizes = (8,) if number == 1 else (5, 3)
    batches = [Batch.random((8, 5, 6, 7), dtype, masked=masked, seed=seed) for seed in range(2)]
    by_rank = list(zip(*(b.shards(sizes) for b in batches), strict=True))
    backend = "inductor" if device == "cuda" else "aot_eager"
    args = [(device, list(steps), options, backend) for steps in by_rank]
    found = ranks(number).run_each(scenarios.compiled_steps, args)
    check_against_oracle(found, batches, sizes, options, factor=2.0)


@pytest.mark.parametrize("sync", ["batch", "none", "running", "lagged"])
def test_a_compiled_model(equal_on_both, sync):
    equal_on_both(2, scenarios.compiled_training, sync)
