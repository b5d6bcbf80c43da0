"""Two ranks that share a device, over gloo, against the float64 oracle on the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from syncnorm.testing import TOLERANCES
from tests.cuda.scenarios import check_layer, layer_steps, torchs_step
from tests.distributed.steps import Batch, oracle_steps

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RENORM = {"bounds": (1.25, 0.25)}
SIZES = (5, 3)


@pytest.mark.parametrize("options", [{}, RENORM], ids=["norm", "renorm"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_uneven_shards_are_the_whole_batch(ranks, device, dtype, channels_last, masked, options):
    batches = [
        Batch.random((8, 5, 6, 7), dtype, channels_last=channels_last, masked=masked, seed=seed)
        for seed in range(2)
    ]
    for steps in check_layer(ranks(2), device, batches, SIZES, options):
        for step in steps:
            assert step.strides[0] == step.strides[1] == step.strides[2]


@pytest.mark.parametrize("tail", [(4,), (64, 49), (3, 2, 3, 5), (130, 3)], ids=str)
@pytest.mark.parametrize("sizes", [(8, 0), (1, 7)], ids=str)
def test_shapes_and_an_empty_shard(ranks, device, sizes, tail):
    check_layer(ranks(2), device, [Batch.random((8, *tail), torch.float32)], sizes, RENORM)


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errs_no_more_than_torchs_own(ranks, device, only_cuda, dtype, channels_last):
    batch = Batch.random((8, 16, 14, 14), dtype, channels_last=channels_last, mean=3.0)
    truth = oracle_steps([batch], {})[0]
    by_rank = batch.shards(SIZES)
    ours = ranks(2).run_each(layer_steps, [(device, [step], {}) for step in by_rank])
    theirs = ranks(2).run_each(torchs_step, [(device, x, g) for x, g, _ in by_rank])
    for name, number in (("y", 0), ("grad_input", 1)):
        expected = getattr(truth, name)
        off = _largest(torch.cat([getattr(steps[0], name) for steps in ours]), expected)
        allowed = _largest(torch.cat([parts[number] for parts in theirs]), expected)
        # Both may be as good as exact.
        exact = 0.1 * TOLERANCES[dtype].atol * expected.abs().max().item()
        assert off <= 2.0 * allowed + exact, name


def _largest(got: Tensor, expected: Tensor) -> float:
    return (got.double() - expected).abs().max().item()
