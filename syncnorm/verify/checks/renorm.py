"""Batch renormalisation: r, d, their bounds and their clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from syncnorm import reference
from syncnorm.maths.renorm import RenormSchedule
from syncnorm.verify.check import check
from syncnorm.verify.compare import expect, expect_close, expect_shards, expect_step
from syncnorm.verify.context import Context
from syncnorm.verify.oracle import Oracle, initial_statistics, parameters, random_batch
from syncnorm.verify.steps import (
    check_steps,
    check_three_steps,
    make_layer,
    my_shard,
    plainly,
    ragged,
    train_step,
)


@check("renorm-clipped", "r and d at their bounds are the paper's", needs="renorm")
def clipped(context: Context) -> None:
    check_three_steps(context, bounds=(1.1, 0.05))


@check("renorm-partly-clipped", "so are those of which some are at their bounds", needs="renorm")
def partly_clipped(context: Context) -> None:
    check_three_steps(context, bounds=(1.5, 0.5))


@check("renorm-unclipped", "so are those within their bounds", needs="renorm")
def unclipped(context: Context) -> None:
    check_three_steps(context, bounds=(100.0, 100.0))


@check("renorm-is-batch-norm", "r_max = 1 and d_max = 0 is batch normalisation", needs="renorm")
def is_batch_norm(context: Context) -> None:
    sizes = ragged(context.world_size)
    batch = random_batch(sum(sizes))
    got = train_step(context, make_layer(context, 4, bounds=(1.0, 0.0)), batch, sizes)
    expected = reference.batch_norm(batch.x, *parameters(4))
    expect_shards("output", [step.y for step in got], expected, sizes, torch.float64)


@check(
    "renorm-trains-as-it-evaluates",
    "unclipped, training normalises as evaluation does",
    needs="renorm",
)
def trains_as_it_evaluates(context: Context) -> None:
    sizes = ragged(context.world_size)
    layer = make_layer(context, 4, bounds=(math.inf, math.inf))
    x, _, _ = my_shard(context, random_batch(sum(sizes)), sizes)
    evaluated = layer.eval()(x)
    trained = layer.train()(x)
    expect_close(
        f"output of rank {context.rank} in training", trained.cpu(), evaluated.cpu(), torch.float64
    )


@check("renorm-constant-r-and-d", "no gradient flows through r and d", needs="renorm, affine")
def constant_r_and_d(context: Context) -> None:
    """Compare the input gradient where r and d are not clipped, so y = (x - running_mean) / sigma.

    If a gradient flowed through r and d, it would be cotangent / sigma.
    """
    sizes = ragged(context.world_size)
    batch = random_batch(sum(sizes))
    got = train_step(
        context, make_layer(context, 4, bounds=(math.inf, math.inf), affine=False), batch, sizes
    )
    running = initial_statistics(context.under_test, 4)
    flowing = batch.cotangent / (running.var + 1e-5).sqrt().view(-1, 1)
    truth = Oracle(context.under_test, 4, {"bounds": (math.inf, math.inf), "affine": False}).step(
        batch, plainly
    )
    assert truth.grad_input is not None
    expect_shards(
        "input gradient", [s.grad_input for s in got], truth.grad_input, sizes, torch.float64
    )
    for rank, (step, other) in enumerate(zip(got, flowing.split(sizes), strict=True)):
        assert step.grad_input is not None
        off = (step.grad_input - other).abs().max().item()
        expect(
            off > 1e-3,
            f"input gradient of rank {rank} is, to within {off:.1e}, that of varying r and d",
        )


@check(
    "renorm-old-statistics",
    "r and d refer to the running statistics as they were before the batch",
    needs="renorm, momentum",
)
def old_statistics(context: Context) -> None:
    """With momentum 1 the new ones are the batch's, and r = 1, d = 0 to nearly all digits."""
    check_three_steps(context, bounds=(100.0, 100.0), momentum=1.0)


@check(
    "renorm-std",
    "what is averaged is the standard deviation; running_var holds its square less eps",
    needs="renorm, momentum, eps",
)
def averages_std(context: Context) -> None:
    check_three_steps(context, momentum=0.5, eps=0.2)


@check(
    "renorm-var", 'running_average="var" averages the unbiased variance', needs="renorm, momentum"
)
def averages_var(context: Context) -> None:
    check_three_steps(context, momentum=0.5, running_average="var")


@check(
    "renorm-schedule",
    "a schedule counts batches: a switch at step 2 acts in the third",
    needs="renorm",
)
def schedule(context: Context) -> None:
    _follow(
        context,
        RenormSchedule.switch(2, 1.5, 0.5),
        lambda step: (1.5, 0.5) if step >= 2 else (1.0, 0.0),
    )


@check("renorm-ramp", "a ramp from step 1 to 3 is halfway in the third batch", needs="renorm")
def ramp(context: Context) -> None:
    bounds = [(1.0, 0.0), (1.0, 0.0), (1.5, 0.25), (2.0, 0.5)]
    ramp = RenormSchedule(r_max=2.0, d_max=0.5, warmup_steps=1, r_steps=3, d_steps=3)
    _follow(context, ramp, lambda step: bounds[min(step, 3)])


@check(
    "renorm-clock-stops",
    "a batch without samples does not move the schedule's clock",
    needs="renorm",
)
def clock_stops(context: Context) -> None:
    layer = make_layer(context, 4, schedule=RenormSchedule.switch(1, 1.5, 0.5))
    sizes = ragged(context.world_size)
    train_step(context, layer, random_batch(0), [0] * context.world_size)
    batch = random_batch(sum(sizes))
    got = train_step(context, layer, batch, sizes)
    expected = reference.batch_norm(batch.x, *parameters(4))
    expect_shards(
        "output of the first batch with samples", [s.y for s in got], expected, sizes, torch.float64
    )


@check("renorm-mask", "r and d are of what counts", needs="renorm, mask")
def masked(context: Context) -> None:
    sizes = ragged(context.world_size)
    check_steps(
        context,
        [random_batch(sum(sizes), masked=True, seed=seed) for seed in range(2)],
        sizes,
        bounds=(2.0, 1.0),
    )


def _follow(
    context: Context,
    schedule: Callable[[Tensor], Any],
    bounds: Callable[[int], tuple[float, float]],
) -> None:
    """Five steps, each with the bounds of its number."""
    sizes = ragged(context.world_size)
    layer = make_layer(context, 4, schedule=schedule)
    oracle = Oracle(context.under_test, 4, {})
    for number in range(5):
        batch = random_batch(sum(sizes), seed=number)
        oracle.bounds = bounds(number)
        got = train_step(context, layer, batch, sizes)
        expect_step(
            got, oracle.step(batch, plainly), sizes, torch.float64, what=f"step {number + 1}: "
        )
