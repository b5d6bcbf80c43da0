"""Weights for elements."""

from __future__ import annotations

import torch

from syncnorm.verify.check import check
from syncnorm.verify.compare import expect, expect_close, expect_same_bits
from syncnorm.verify.context import Context
from syncnorm.verify.oracle import Batch, Oracle, random_batch
from syncnorm.verify.steps import check_steps, make_layer, my_shard, plainly, ragged, train_step


@check(
    "mask-weights", "an element of weight 2 counts as two, one of weight 0 not at all", needs="mask"
)
def mask_weights(context: Context) -> None:
    sizes = ragged(context.world_size)
    check_steps(
        context, [random_batch(sum(sizes), masked=True, seed=seed) for seed in range(2)], sizes
    )


@check(
    "mask-removes",
    "samples of weight 0 leave the others as they would be without them",
    needs="mask",
)
def mask_removes(context: Context) -> None:
    sizes = [3] * context.world_size
    batch = random_batch(sum(sizes))
    kept = torch.arange(sum(sizes)) % 3 != 1
    layer = make_layer(context, 4)
    got = train_step(context, layer, Batch(batch.x, batch.cotangent, kept.view(-1, 1, 1)), sizes)
    truth = Oracle(context.under_test, 4, {})
    expected = truth(batch.x[kept])
    y = torch.cat([step.y for step in got])[kept]
    expect_close("output of the samples that count", y, expected, torch.float64)
    for name, value in truth.buffers().items():
        expect_close(name, got[0].buffers.get(name), value, torch.float64)


@check("mask-zero-on-one", "a worker may have nothing that counts", needs="mask", workers=2)
def mask_zero_on_one(context: Context) -> None:
    sizes = [2] * context.world_size
    batch = random_batch(sum(sizes), masked=True)
    assert batch.mask is not None
    batch.mask[-2:] = 0
    check_steps(context, [batch], sizes)


@check(
    "mask-zero-everywhere",
    "where nothing counts on any worker no buffer changes, and nothing is NaN",
    needs="mask",
)
def mask_zero_everywhere(context: Context) -> None:
    sizes = [2] * context.world_size
    batch = random_batch(sum(sizes), masked=True)
    assert batch.mask is not None
    batch.mask.zero_()
    layer = make_layer(context, 4)
    before = {name: b.cpu().clone() for name, b in layer.named_buffers()}
    for rank, step in enumerate(train_step(context, layer, batch, sizes)):
        expect(
            bool(step.y.isfinite().all()),
            f"output of rank {rank} is not finite where nothing counts",
        )
        for name, value in before.items():
            expect_same_bits(
                f"{name} of rank {rank}, where nothing counts,", step.buffers[name], value
            )


@check(
    "mask-on-one", "a worker without a mask is one whose mask is all ones", needs="mask", workers=2
)
def mask_on_one(context: Context) -> None:
    sizes = [2] * context.world_size
    batch = random_batch(sum(sizes), masked=True)
    assert batch.mask is not None
    batch.mask[2:] = 1
    check_steps(
        context,
        [batch],
        sizes,
        lambda layer, x, mask: layer(x, mask if context.rank == 0 else None),
        truth=plainly,
    )


@check("mask-in-evaluation", "evaluation does not look at it", needs="mask")
def mask_in_evaluation(context: Context) -> None:
    sizes = [2] * context.world_size
    layer = make_layer(context, 4).eval()
    x, _, mask = my_shard(context, random_batch(sum(sizes), masked=True), sizes)
    expect_same_bits(
        "output in evaluation, with a mask,", layer(x, mask).detach(), layer(x).detach()
    )
