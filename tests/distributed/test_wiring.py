"""Messages and their number, and bit-exact results where arithmetic is exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import ways
from tests.distributed.steps import Batch, check_against_oracle, run_steps, train_step


@pytest.mark.parametrize("sizes", [(3, 3), (6, 0), (1, 2, 3), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("bounds", [{}, {"bounds": (2.0, 1.0)}], ids=["norm", "renorm"])
@pytest.mark.parametrize("options", [{}, {"affine": False}], ids=str)
def test_one_exchange_forward_and_one_backward(pool, sizes, options, bounds):
    batch = Batch.random((sum(sizes), 5, 4, 4), torch.float32)
    for outcomes in run_steps(pool(len(sizes)), [batch], sizes, options | bounds):
        assert outcomes[0].exchanges == [("moments", 2 * 5 + 2), ("gradients", 2 * 5 + 2)]


@pytest.mark.parametrize(("sizes", "options"), [((6,), {}), ((3, 3), {"sync": "none"})], ids=str)
def test_no_exchange_with_nobody_to_exchange_with(pool, sizes, options):
    batch = Batch.random((6, 5, 4, 4), torch.float32)
    for outcomes in run_steps(pool(len(sizes)), [batch], sizes, options):
        assert outcomes[0].exchanges == []


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("sizes", [(2, 6), (8, 0), (1, 2, 5), (4, 1, 2, 1)], ids=str)
def test_integers_are_pooled_exactly(pool, sizes, channels_last):
    """Integers and a power-of-two count: sums are exact, so any split gives the same bits."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (8, 3, 4, 4), generator=g).float()
    cotangent = torch.randint(-4, 5, x.shape, generator=g).float()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    batch = Batch(x, cotangent)
    whole = train_step(batch.shards((8,)), {})[0]
    got = [o[0] for o in run_steps(pool(len(sizes)), [batch], sizes)]
    # Kernels of two kinds round what is not an integer in two ways.
    error = 1e-6 if ways.is_mixed() else 0.0
    for name in ("y", "grad_input"):
        whole_batch, shards = getattr(whole, name), [getattr(o, name) for o in got]
        torch.testing.assert_close(torch.cat(shards), whole_batch, rtol=error, atol=error)
    assert torch.equal(sum(o.parameters["bias"] for o in got), whole.parameters["bias"])
    for outcome in got:
        for name, value in outcome.buffers.items():
            assert torch.equal(value, whole.buffers[name]), name


@settings(max_examples=60)
@given(
    data=st.data(),
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    channels=st.integers(1, 6),
    spatial=st.lists(st.integers(1, 5), max_size=3),
)
def test_any_split_equals_the_whole_batch(pool, data, sizes, channels, spatial):
    """Ragged, empty, one sample, permuted workers, with and without a mask."""
    options = {
        "affine": data.draw(st.booleans()),
        "momentum": data.draw(st.sampled_from([0.1, None, 1.0])),
    }
    batches = [
        Batch.random(
            (sum(sizes), channels, *spatial),
            torch.float64,
            channels_last=data.draw(st.booleans()),
            masked=data.draw(st.booleans()),
            seed=data.draw(st.integers(0, 9)),
        )
        for _ in range(2)
    ]
    by_rank = run_steps(pool(len(sizes)), batches, sizes, options)
    check_against_oracle(by_rank, batches, sizes, options, factor=10.0)
