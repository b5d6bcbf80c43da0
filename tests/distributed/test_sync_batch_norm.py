"""SyncBatchNorm on live process groups equals the whole batch: values, gradients, buffers."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from syncnorm import SyncBatchNorm
from syncnorm.testing import TOLERANCES
from tests.covering import covering
from tests.distributed.steps import (
    Batch,
    check_against_oracle,
    compare,
    oracle_steps,
    parameters,
    run_steps,
    train_step,
)

SPLITS = [
    (6,),
    (4, 2),
    (6, 0),
    (1, 5),
    (3, 0, 3),
    (1, 1, 1),
    (5, 2, 1),
    (2, 2, 2, 2),
    (7, 0, 1, 0),
    (1, 1, 1, 1),
]
SPATIAL = [(), (7,), (5, 4), (3, 2, 4)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    *covering(
        # They choose the kernel.
        ("dtype", "spatial", "channels_last"),
        dtype=DTYPES,
        sizes=SPLITS,
        spatial=SPATIAL,
        channels_last=[False, True],
    ),
    ids=str,
)
def test_equals_the_whole_batch(pool, dtype, sizes, spatial, channels_last):
    batches = [
        Batch.random((sum(sizes), 5, *spatial), dtype, channels_last=channels_last, seed=seed)
        for seed in (0, 1)
    ]
    by_rank = run_steps(pool(len(sizes)), batches, sizes)
    check_against_oracle(by_rank, batches, sizes)


@pytest.mark.parametrize(
    *covering(
        ("dtype", "spatial", "channels_last"),
        spatial=SPATIAL,
        dtype=DTYPES,
        sizes=[(6,), (4, 2), (5, 0, 3), (2, 1, 4, 1)],
        channels_last=[False, True],
    ),
    ids=str,
)
def test_a_mask_weights_elements_by_frequency(pool, spatial, dtype, sizes, channels_last):
    batch = Batch.random(
        (sum(sizes), 3, *spatial), dtype, masked=True, channels_last=channels_last, seed=2
    )
    by_rank = run_steps(pool(len(sizes)), [batch], sizes)
    check_against_oracle(by_rank, [batch], sizes)


@pytest.mark.parametrize("sizes", [(4,), (3, 1), (2, 0, 2)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"affine": False},
        {"track_running_stats": False},
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": 1.0},
        {"eps": 1e-2},
        {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)
def test_options(pool, options, sizes):
    batches = [Batch.random((sum(sizes), 4, 3, 3), torch.float64, seed=seed) for seed in range(3)]
    by_rank = run_steps(pool(len(sizes)), batches, sizes, options)
    check_against_oracle(by_rank, batches, sizes, options)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_memory_layout_is_kept(pool, layout):
    batch = Batch.random((4, 6, 5, 3), torch.float32, channels_last=layout == "channels_last")
    for outcomes in run_steps(pool(2), [batch], (2, 2)):
        x, y, grad = outcomes[0].strides
        assert x == y == grad


def test_every_worker_gets_the_same_bits(pool):
    batch = Batch.random((23, 7, 5, 5), torch.float32, mean=30.0)
    by_rank = run_steps(pool(4), [batch], (9, 1, 6, 7))
    for outcomes in by_rank[1:]:
        for name, value in outcomes[0].buffers.items():
            assert torch.equal(value, by_rank[0][0].buffers[name]), name


def test_pooled_differs_from_local(pool):
    """The negative control: on shards of different means the local layer is far from the batch."""
    batch = Batch.random((6, 4, 3, 3), torch.float64)
    expected = oracle_steps([batch], {})[0]
    local = run_steps(pool(2), [batch], (3, 3), {"sync": "none"})
    with pytest.raises(AssertionError, match="y: 216 of 216 elements are off"):
        compare([o[0] for o in local], expected, torch.float64, (3, 3), "local")
    assert not torch.equal(local[0][0].buffers["running_mean"], local[1][0].buffers["running_mean"])


def test_subgroups_pool_among_themselves(pool):
    batch = Batch.random((8, 3, 4), torch.float64)
    sizes, halves = (3, 1, 2, 2), ((0, 2), (1, 3))
    args = [([step], {}, halves) for step in batch.shards(sizes)]
    by_rank = pool(4).run_each(train_step, args)
    starts = [sum(sizes[:r]) for r in range(4)]
    for ranks in halves:
        rows = [i for r in ranks for i in range(starts[r], starts[r] + sizes[r])]
        part = Batch(batch.x[rows], batch.cotangent[rows])
        check_against_oracle([by_rank[r] for r in ranks], [part], [sizes[r] for r in ranks])


@pytest.mark.parametrize("sizes", [(3,), (2, 1), (1, 0, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_err_no_more_than_twice_torch(pool, dtype, sizes):
    batch = Batch.random((3, 8, 16, 16), dtype)
    outcomes = [o[0] for o in run_steps(pool(len(sizes)), [batch], sizes)]
    expected = oracle_steps([batch], {})[0]
    x = batch.x.clone().requires_grad_()
    weight, bias = parameters(8, torch.float32)
    y = F.batch_norm(x, None, None, weight, bias, training=True)
    y.backward(batch.cotangent)
    assert x.grad is not None
    for name, theirs in (("y", y), ("grad_input", x.grad)):
        truth = getattr(expected, name)
        ours = torch.cat([getattr(o, name) for o in outcomes])
        error = (ours.double() - truth).abs().max()
        assert error <= 2 * (theirs.double() - truth).abs().max(), name


@pytest.mark.parametrize(("ratio", "bound"), [(1.0, 1e-10), (1e2, 1e-10), (1e4, 1e-7)])
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_float64_at_large_means(pool, sizes, ratio, bound):
    """Relative to the largest value: 1e-10 up to mean/std = 100, 1e-7 up to 1e4."""
    batch = Batch.random((sum(sizes), 3, 6, 6), torch.float64, mean=ratio, std=1.0)
    by_rank = run_steps(pool(len(sizes)), [batch], sizes)
    check_against_oracle(by_rank, [batch], sizes, factor=bound / sum(TOLERANCES[torch.float64]))


def _pooled_variance(
    sizes: list[int], tail: tuple[int, ...], channels_last: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's unbiased float32 variance of shards about 1e4, 1e4 + 2, 1e4 - 1; and this shard."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(sizes[rank], *tail, generator=generator) + 1e4 + (0.0, 2.0, -1.0)[rank]
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    layer = SyncBatchNorm(tail[0], momentum=1.0)
    layer(x)
    assert layer.running_var is not None
    return layer.running_var, x


@pytest.mark.parametrize(
    ("tail", "channels_last", "bound"),
    [
        ((32, 56, 56), False, 1e-5),
        ((32, 56, 56), True, 5e-5),
        ((512, 7, 7), False, 1e-5),
        ((512, 7, 7), True, 5e-5),
        ((64,), False, 5e-5),
    ],
    ids=str,
)
def test_float32_variance_at_large_means(pool, tail, channels_last, bound):
    """mean/std = 1e4, pooled over three uneven workers of different means: the worst channel."""
    sizes = [8000, 1, 3000] if len(tail) == 1 else [9, 1, 4]
    answers = pool(3).run(_pooled_variance, sizes, tail, channels_last)
    whole = torch.cat([x for _, x in answers]).double()
    truth = whole.var([0, *range(2, whole.ndim)], correction=1)
    for var, _ in answers:
        assert ((var.double() - truth).abs() / truth).max() <= bound
