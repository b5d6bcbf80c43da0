"""Wrong input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from syncnorm.errors import in_one_line
from syncnorm.verify.check import check
from syncnorm.verify.compare import expect, expect_same_bits
from syncnorm.verify.context import Context
from syncnorm.verify.oracle import random_batch
from syncnorm.verify.steps import make_layer, my_shard, ragged, train_step


@check(
    "bad-mask",
    "a negative weight on one worker is the same error on all, and nothing was updated",
    needs="mask",
)
def bad_mask(context: Context) -> None:
    sizes = [2] * context.world_size
    layer = make_layer(context, 4)
    x, _, _ = my_shard(context, random_batch(sum(sizes)), sizes)
    mask = torch.ones(2, 1, 5, device=context.device)
    if context.rank == context.world_size - 1:
        mask[1, 0, 2] = -1.0
    before = {name: b.clone() for name, b in layer.named_buffers()}
    raised = _expect_one_error(context, layer, x, mask)
    if raised is None and context.device.type != "cpu":
        return  # documented: on CUDA nobody looks at values, outside of debug mode
    expect(raised is not None, "a negative weight in a mask raises nothing")
    for name, value in layer.named_buffers():
        expect_same_bits(f"{name} of rank {context.rank} after a fault", value, before[name])
    train_step(context, layer, random_batch(sum(sizes)), sizes)


@check("wrong-channels", "a wrong number of channels is an error, and the layer works afterwards")
def wrong_channels(context: Context) -> None:
    _expect_refused(context, (3, 5), "x of 3 channels, to a layer of 4,")


@check(
    "wrong-dimensions",
    "input without a channel dimension is an error, and the layer works afterwards",
)
def wrong_dimensions(context: Context) -> None:
    _expect_refused(context, (), "x of one dimension")


@check(
    "nan-is-seen",
    "NaN in one worker's input reaches every worker's output, in its channel and in no other",
)
def nan_is_seen(context: Context) -> None:
    sizes = [2] * context.world_size
    batch = random_batch(sum(sizes))
    batch.x[-1, 2, 0] = float("nan")
    for rank, step in enumerate(train_step(context, make_layer(context, 4), batch, sizes)):
        is_nan = step.y.isnan().all(2).all(0).tolist()
        others = step.y[:, [0, 1, 3]]
        expect(
            is_nan[2],
            f"output of rank {rank} hides that the input of rank "
            f"{context.world_size - 1} has a NaN",
        )
        expect(
            bool(others.isfinite().all()),
            f"output of rank {rank} is not finite in channels without NaN",
        )


def _expect_refused(context: Context, tail: tuple[int, ...], what: str) -> None:
    layer = make_layer(context, 4)
    raised = _expect_one_error(
        context, layer, torch.ones(2, *tail, dtype=torch.float64, device=context.device), None
    )
    expect(raised is not None, f"{what} raises nothing")
    sizes = ragged(context.world_size)
    train_step(context, layer, random_batch(sum(sizes)), sizes)


def _expect_one_error(
    context: Context, layer: nn.Module, x: Tensor, mask: Tensor | None
) -> str | None:
    """The error that all workers raise; None if none does."""
    try:
        layer(x) if mask is None else layer(x, mask)
        mine = None
    except Exception as error:  # whatever a layer may raise
        mine = in_one_line(error)[:300]
    said = context.gather(mine)
    others = [f"rank {rank}: {text}" for rank, text in enumerate(said)]
    expect(len(set(said)) == 1, f"workers do not raise the same error: {'; '.join(others)}")
    return mine
