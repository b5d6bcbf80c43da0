"""Running statistics."""

from __future__ import annotations

from typing import Any

import torch

from syncnorm.verify.check import check
from syncnorm.verify.compare import expect, expect_close, expect_same_bits
from syncnorm.verify.context import Context
from syncnorm.verify.oracle import random_batch
from syncnorm.verify.steps import make_layer, ragged, train_step


@check("buffers-equal", "running statistics are equal to the bit on all workers")
def buffers_equal(context: Context) -> None:
    sizes = ragged(context.world_size)
    layer = make_layer(context, 7, torch.float32)
    for seed in range(3):
        batch = random_batch(sum(sizes), (7, 5, 5), torch.float32, mean=30.0, seed=seed)
        got = train_step(context, layer, batch, sizes)
        for name, value in got[0].buffers.items():
            for rank, step in enumerate(got):
                expect_same_bits(
                    f"{name} of rank {rank}, against rank 0,", step.buffers[name], value
                )


@check(
    "global-count",
    "running_var takes the unbiased variance, by the count over all workers",
    needs="momentum,no renorm",
)
def global_count(context: Context) -> None:
    sizes = [1] * context.world_size
    batch = random_batch(sum(sizes), (4, 2))
    got = train_step(context, make_layer(context, 4, momentum=1.0), batch, sizes)
    truth = batch.x.var([0, 2], correction=1)
    expect_close("running_var", got[0].buffers.get("running_var"), truth, torch.float64)


@check("counted-once", "num_batches_tracked counts each batch once")
def counted_once(context: Context) -> None:
    sizes = ragged(context.world_size)
    layer = make_layer(context, 4)
    for number in range(1, 4):
        for rank, step in enumerate(train_step(context, layer, random_batch(sum(sizes)), sizes)):
            count = step.buffers.get("num_batches_tracked")
            got = None if count is None else count.item()
            expect(
                got == number, f"num_batches_tracked of rank {rank} is {got} after {number} batches"
            )


@check("buffers-keep-type", "running statistics stay float32 where the input is half")
def buffers_keep_type(context: Context) -> None:
    sizes = ragged(context.world_size)
    got = train_step(
        context,
        make_layer(context, 4, torch.bfloat16),
        random_batch(sum(sizes), dtype=torch.bfloat16),
        sizes,
    )
    for name in ("running_mean", "running_var"):
        value = got[0].buffers.get(name)
        expect(
            value is not None and value.dtype == torch.float32,
            f"{name} is {getattr(value, 'dtype', 'missing')}",
        )


@check("parameters-stay", "a training step changes no weight and no bias by itself")
def parameters_stay(context: Context) -> None:
    sizes = ragged(context.world_size)
    layer = make_layer(context, 4)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    train_step(context, layer, random_batch(sum(sizes)), sizes)
    for name, p in layer.named_parameters():
        expect_same_bits(f"{name} of rank {context.rank}", p.detach(), before[name])


@check("input-stays", "a training step does not write into its input")
def input_stays(context: Context) -> None:
    sizes = ragged(context.world_size)
    batch = random_batch(sum(sizes))
    seen = []

    def use(layer, x, mask):
        seen.append(x)
        return layer(x)

    train_step(context, make_layer(context, 4), batch, sizes, use)
    expect_same_bits(
        f"input of rank {context.rank}", seen[0].detach().cpu(), batch.x.split(sizes)[context.rank]
    )


@check("reset", "reset_running_stats() starts again")
def reset(context: Context) -> None:
    sizes = ragged(context.world_size)
    layer: Any = make_layer(context, 4)
    train_step(context, layer, random_batch(sum(sizes)), sizes)
    layer.reset_running_stats()
    fresh = context.under_test.make(4).double()
    for name, value in fresh.named_buffers():
        expect_same_bits(f"{name} after a reset", dict(layer.named_buffers())[name].cpu(), value)
