"""Types, and data that are hard on them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from syncnorm.testing import TOLERANCES
from syncnorm.verify.check import check
from syncnorm.verify.compare import expect, expect_close
from syncnorm.verify.context import Context
from syncnorm.verify.oracle import Batch, Oracle, random_batch
from syncnorm.verify.steps import check_steps, make_layer, plainly, ragged, train_step


@check(
    "float32", "in float32 a batch in shards is the whole batch, within 2e-5 of the largest value"
)
def float32(context: Context) -> None:
    sizes = ragged(context.world_size)
    check_steps(
        context,
        [random_batch(sum(sizes), (4, 6, 6), torch.float32, seed=seed) for seed in range(2)],
        sizes,
    )


@check(
    "bfloat16",
    "in bfloat16 output and input gradient err at most twice as much as torch's own operator",
)
def bfloat16(context: Context) -> None:
    _err_no_more_than_twice_torch(
        context, random_batch(3 * context.world_size, (8, 16, 16), torch.bfloat16)
    )


@check("float16", "so they do in float16")
def float16(context: Context) -> None:
    _err_no_more_than_twice_torch(
        context, random_batch(3 * context.world_size, (8, 16, 16), torch.float16)
    )


@check(
    "float16-large",
    "also where values are about 300, and the sum of their squares has no room in float16",
)
def float16_large(context: Context) -> None:
    batch = random_batch(3 * context.world_size, (8, 16, 16), torch.float16, mean=100.0, std=300.0)
    _err_no_more_than_twice_torch(context, batch)


@check(
    "float16-many",
    "also of more than 65504 values per channel, a number that has no room in float16",
)
def float16_many(context: Context) -> None:
    sizes = [1] * context.world_size
    batch = random_batch(sum(sizes), (1, 260, 260), torch.float16)
    layer = make_layer(context, 1, torch.float16)
    got = train_step(context, layer, batch, sizes)
    truth = Oracle(context.under_test, 1, {})
    truth(batch.x)
    for rank, step in enumerate(got):
        for name, value in truth.buffers().items():
            expect_close(f"{name} of rank {rank}", step.buffers.get(name), value, torch.float32)


@check(
    "float64-large-mean", "in float64 mean/std = 1e4 costs no more than 1e-7 of the largest value"
)
def float64_large_mean(context: Context) -> None:
    sizes = ragged(context.world_size)
    batch = random_batch(sum(sizes), (3, 6, 6), mean=1e4, std=1.0)
    check_steps(context, [batch], sizes, factor=1e-7 / sum(TOLERANCES[torch.float64]))


@check(
    "float32-large-mean",
    "in float32 the variance at mean/std = 1e4 is right within 5e-5",
    needs="momentum",
)
def float32_large_mean(context: Context) -> None:
    batch = random_batch(3 * context.world_size, (4, 24, 24), torch.float32, mean=1e4, std=1.0)
    _expect_running_var(context, batch, 5e-5)


@check(
    "float32-small-variance",
    "in float32 a variance far below eps is not lost",
    needs="momentum, eps",
)
def float32_small_variance(context: Context) -> None:
    batch = random_batch(3 * context.world_size, (4, 8, 8), torch.float32, mean=0.0, std=3e-5)
    if (
        context.under_test.is_renorm
    ):  # of which running_var + eps is kept: there is nothing below eps to be seen
        check_steps(context, [batch], [3] * context.world_size, eps=1e-3)
    else:
        _expect_running_var(context, batch, 1e-4, eps=1e-3)


def _expect_running_var(context: Context, batch: Batch, allowed: float, **options: float) -> None:
    """With momentum 1 running_var is the batch's."""
    options["momentum"] = 1.0
    layer = make_layer(context, 4, torch.float32, **options)
    got = train_step(context, layer, batch, [3] * context.world_size)
    truth = Oracle(context.under_test, 4, options)
    truth(batch.x)
    expected = truth.buffers()["running_var"]
    for rank, step in enumerate(got):
        off = ((step.buffers["running_var"].double() - expected).abs() / expected).max().item()
        expect(
            off <= allowed,
            f"running_var of rank {rank} is a share of {off:.1e} off, allowed {allowed:.1e}",
        )


def _err_no_more_than_twice_torch(context: Context, batch: Batch) -> None:
    sizes = [3] * context.world_size
    got = train_step(context, make_layer(context, 8, batch.x.dtype), batch, sizes)
    oracle = Oracle(context.under_test, 8, {})
    weight, bias = oracle.folded(batch.x)
    truth = oracle.step(batch, plainly)
    x = batch.x.clone().requires_grad_()
    theirs = F.batch_norm(x, None, None, weight.float(), bias.float(), training=True)
    theirs.backward(batch.cotangent)
    _compare_errors("output", [step.y for step in got], truth.y, theirs.detach())
    assert truth.grad_input is not None
    assert x.grad is not None
    _compare_errors("input gradient", [step.grad_input for step in got], truth.grad_input, x.grad)


def _compare_errors(what: str, ours: list[Tensor | None], truth: Tensor, theirs: Tensor) -> None:
    """Judged over the whole batch, and by the largest error."""
    allowed = 2 * (theirs.double() - truth).abs().max().item()
    for rank, (part, expected) in enumerate(zip(ours, truth.chunk(len(ours)), strict=True)):
        expect(part is not None, f"{what} of rank {rank} is missing")
        assert part is not None
        off = (part.double() - expected).abs().max().nan_to_num(float("inf")).item()
        expect(
            off <= allowed,
            f"{what} of rank {rank} is {off:.1e} off, allowed {allowed:.1e}, twice torch's own",
        )
        expect(
            part.dtype == theirs.dtype,
            f"{what} of rank {rank} has type {part.dtype}, should be {theirs.dtype}",
        )
