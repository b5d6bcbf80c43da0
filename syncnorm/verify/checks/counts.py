"""Degenerate batches: empty, one value, two values, a constant channel."""

from __future__ import annotations

import torch

from syncnorm.verify.check import check
from syncnorm.verify.compare import expect, expect_same_bits
from syncnorm.verify.context import Context
from syncnorm.verify.oracle import Batch, Oracle, random_batch
from syncnorm.verify.steps import check_steps, make_layer, ragged, train_step


@check(
    "all-empty", "a batch without a sample on any worker changes no buffer, not the counter either"
)
def all_empty(context: Context) -> None:
    layer = make_layer(context, 4)
    before = {name: b.cpu().clone() for name, b in layer.named_buffers()}
    for rank, step in enumerate(
        train_step(context, layer, random_batch(0), [0] * context.world_size)
    ):
        expect(
            step.y.shape == (0, 4, 5),
            f"output of rank {rank} has shape {tuple(step.y.shape)}, should be (0, 4, 5)",
        )
        for name, value in before.items():
            expect_same_bits(
                f"{name} of rank {rank}, after an empty batch,", step.buffers[name], value
            )


@check("empty-then-full", "the batch after an empty one is treated like a first one")
def empty_then_full(context: Context) -> None:
    sizes = ragged(context.world_size)
    layer = make_layer(context, 4)
    train_step(context, layer, random_batch(0), [0] * context.world_size)
    batch = random_batch(sum(sizes))
    got = train_step(context, layer, batch, sizes)
    expected = Oracle(context.under_test, 4, {})(batch.x).split(sizes)
    for rank, step in enumerate(got):
        off = (step.y - expected[rank]).abs().max().item()
        expect(
            off < 1e-10,
            f"output of rank {rank}, after an empty batch, is {off:.1e} off, allowed 1e-10",
        )


@check(
    "single-value",
    "a statistic of one value gives the bias, has no gradient, and leaves running_var finite and "
    "as it was",
)
def single_value(context: Context) -> None:
    sizes = [0] * (context.world_size - 1) + [1]
    x = torch.tensor([[3.0, -2.0, 0.5, 7.0]], dtype=torch.float64)
    check_steps(context, [Batch(x, torch.ones_like(x))], sizes)


@check("two-values", "a statistic of two values is one like any other")
def two_values(context: Context) -> None:
    sizes = [1, *[0] * (context.world_size - 2), 1] if context.world_size > 1 else [2]
    check_steps(context, [random_batch(2, (4,), seed=seed) for seed in range(2)], sizes)


@check(
    "constant-channel",
    "a channel of equal values is normalised to the bias, not to rounding errors",
)
def constant_channel(context: Context) -> None:
    sizes = ragged(context.world_size)
    batch = random_batch(sum(sizes))
    batch.x[:, 1] = 0.25
    check_steps(context, [batch], sizes)
