"""A batch in shards is one batch."""

from __future__ import annotations

import torch
import torch.distributed as dist

from syncnorm.verify.check import CheckFailed, check
from syncnorm.verify.compare import expect, expect_same_bits
from syncnorm.verify.context import Context
from syncnorm.verify.oracle import Batch, Oracle, Step, random_batch
from syncnorm.verify.steps import check_steps, fill, make_layer, plainly, ragged, train_step

RUNS = "runs"
"""The check without which the others say nothing."""


@check(RUNS, "a training step on equal shards raises nothing")
def runs(context: Context) -> None:
    train_step(
        context,
        make_layer(context, 4),
        random_batch(2 * context.world_size),
        [2] * context.world_size,
    )


@check(
    "equal-shards",
    "outputs, gradients and buffers of three steps on equal shards are those of the whole batch",
)
def equal_shards(context: Context) -> None:
    sizes = [3] * context.world_size
    check_steps(context, [random_batch(sum(sizes), seed=seed) for seed in range(3)], sizes)


@check("ragged-shards", "so are those of shards of different sizes")
def ragged_shards(context: Context) -> None:
    sizes = ragged(context.world_size)
    check_steps(context, [random_batch(sum(sizes), seed=seed) for seed in range(3)], sizes)


@check("one-sample-each", "so are those of one sample for each worker")
def one_sample_each(context: Context) -> None:
    sizes = [1] * context.world_size
    check_steps(context, [random_batch(sum(sizes), seed=seed) for seed in range(2)], sizes)


@check(
    "last-empty",
    "a worker without samples takes part: zeros for its parameters, the whole batch for the rest",
    workers=2,
)
def last_empty(context: Context) -> None:
    sizes = [*ragged(context.world_size - 1), 0]
    check_steps(context, [random_batch(sum(sizes), seed=seed) for seed in range(2)], sizes)


@check("first-empty", "also where it is rank 0", workers=2)
def first_empty(context: Context) -> None:
    sizes = [0, *ragged(context.world_size - 1)]
    check_steps(context, [random_batch(sum(sizes), seed=seed) for seed in range(2)], sizes)


@check("all-but-one-empty", "also where only one worker has samples", workers=2)
def all_but_one_empty(context: Context) -> None:
    sizes = [0] * (context.world_size - 1) + [5]
    check_steps(context, [random_batch(5, seed=seed) for seed in range(2)], sizes)


@check("permuted-ranks", "it does not matter which worker has which shard", workers=2)
def permuted_ranks(context: Context) -> None:
    sizes = ragged(context.world_size)
    batch = random_batch(sum(sizes))
    parts = range(context.world_size)
    turned = Batch(*(torch.cat(list(reversed(t.split(sizes)))) for t in (batch.x, batch.cotangent)))
    one = train_step(context, make_layer(context, 4), batch, sizes)
    other = train_step(context, make_layer(context, 4), turned, sizes[::-1])
    for rank in parts:
        off = (one[rank].y - other[-1 - rank].y).abs().max().item()
        expect(
            off < 1e-12,
            f"output of a shard is {off:.1e} off when rank {parts[-1 - rank]} has it, allowed "
            "1e-12",
        )


@check(
    "subgroups",
    "workers of a process group pool among themselves",
    needs="process_group",
    workers=2,
)
def subgroups(context: Context) -> None:
    ranks = list(range(context.world_size))
    halves = [ranks[::2], ranks[1::2]]
    groups = [dist.new_group(half) for half in halves]
    mine = context.rank % 2
    sizes = ragged(context.world_size)
    whole = random_batch(sum(sizes))
    layer = make_layer(context, 4, process_group=groups[mine])
    got = train_step(context, layer, whole, sizes)
    for half in halves:
        rows = torch.cat([torch.arange(sum(sizes)).split(sizes)[rank] for rank in half])
        expected = Oracle(context.under_test, 4, {}).step(
            Batch(whole.x[rows], whole.cotangent[rows]), plainly
        )
        for rank, truth in zip(half, expected.y.split([sizes[r] for r in half]), strict=True):
            off = (got[rank].y - truth).abs().max().item()
            expect(
                off < 1e-10,
                f"output of rank {rank} is {off:.1e} off that of group {half}, allowed 1e-10",
            )


@check(
    "differs-from-local", "the pooled output is far from that of each shard by itself", workers=2
)
def differs_from_local(context: Context) -> None:
    sizes = [3] * context.world_size
    batch = random_batch(sum(sizes))
    got = train_step(context, make_layer(context, 4), batch, sizes)
    for rank, (x, step) in enumerate(zip(batch.x.split(sizes), got, strict=True)):
        alone = Oracle(context.under_test, 4, {})(x)
        off = (step.y - alone).abs().max().item()
        expect(
            off > 1e-3,
            f"output of rank {rank} is that of its own shard alone, to within {off:.1e}: nothing "
            "is pooled",
        )


@check(
    "exact-on-integers",
    "the mean of integers, of a power of two in number, is exact",
    needs="momentum",
)
def exact_on_integers(context: Context) -> None:
    sizes = _powers_of_two(context.world_size)
    x = torch.randint(-64, 64, (sum(sizes), 3, 4), generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.float64):
        layer = make_layer(context, 3, dtype, momentum=1.0)
        fill(layer, {"running_mean": torch.zeros(3)})
        got = train_step(context, layer, Batch(x.to(dtype), torch.ones_like(x, dtype=dtype)), sizes)
        truth = x.double().mean([0, 2]).to(dtype)
        for rank, step in enumerate(got):
            expect_same_bits(
                f"running_mean of rank {rank} ({dtype})", _buffer(step, "running_mean"), truth
            )


@check("same-bits-again", "the same step on the same shards gives the same bits")
def same_bits_again(context: Context) -> None:
    sizes = ragged(context.world_size)
    batch = random_batch(sum(sizes), dtype=torch.float32)
    one, other = (
        train_step(context, make_layer(context, 4, torch.float32), batch, sizes) for _ in range(2)
    )
    for rank in range(context.world_size):
        expect_same_bits(f"output of rank {rank}, a second time,", other[rank].y, one[rank].y)
        for name, value in one[rank].buffers.items():
            expect_same_bits(
                f"{name} of rank {rank}, a second time,", other[rank].buffers[name], value
            )


def _powers_of_two(workers: int) -> list[int]:
    """Uneven sizes that add up to a power of two."""
    total = 8
    while total < 2 * workers:
        total *= 2
    return [*[1] * (workers - 1), total - workers + 1]


def _buffer(step: Step, name: str) -> torch.Tensor:
    if name not in step.buffers:
        raise CheckFailed(f"{name} is missing")
    return step.buffers[name]
