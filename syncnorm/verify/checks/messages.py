"""The number of messages and their size."""

from __future__ import annotations

import torch

from syncnorm.verify.check import check
from syncnorm.verify.collectives import counted
from syncnorm.verify.compare import expect
from syncnorm.verify.context import Context
from syncnorm.verify.oracle import Batch, random_batch
from syncnorm.verify.steps import make_layer, my_shard, ragged, train_step


@check(
    "messages",
    "one all-reduce of at most 2C+2 numbers in each direction, whatever the number of workers",
    needs="messages",
)
def messages(context: Context) -> None:
    sizes = ragged(context.world_size)
    _expect_messages(context, random_batch(sum(sizes)), sizes)


@check("messages-empty", "the same from a worker without samples", needs="messages", workers=2)
def messages_empty(context: Context) -> None:
    sizes = [*ragged(context.world_size - 1), 0]
    _expect_messages(context, random_batch(sum(sizes)), sizes)


@check("messages-mask", "the same with a mask", needs="messages, mask")
def messages_mask(context: Context) -> None:
    sizes = ragged(context.world_size)
    _expect_messages(context, random_batch(sum(sizes), masked=True), sizes)


@check("messages-half", "the same in bfloat16", needs="messages")
def messages_half(context: Context) -> None:
    sizes = ragged(context.world_size)
    _expect_messages(context, random_batch(sum(sizes), dtype=torch.bfloat16), sizes)


@check("messages-no-gradient", "the same where the input needs no gradient", needs="messages")
def messages_no_gradient(context: Context) -> None:
    sizes = ragged(context.world_size)
    _expect_messages(context, random_batch(sum(sizes)), sizes, needs_grad=False)


def _expect_messages(
    context: Context, batch: Batch, sizes: list[int], needs_grad: bool = True
) -> None:
    layer = make_layer(context, 4, batch.x.dtype)
    train_step(context, layer, batch, sizes)  # the first makes the group that statistics travel on
    x, cotangent, mask = my_shard(context, batch, sizes)
    x.requires_grad_(needs_grad)
    with counted() as forward:
        y = layer(x) if mask is None else layer(x, mask)
    with counted() as backward:
        y.backward(cotangent)
    names, due = (
        (["allreduce"], "one all-reduce of 8 to 10 numbers")
        if context.world_size > 1
        else ([], "nothing")
    )
    for when, got in (("forward", forward), ("backward", backward)):
        is_right = [name for name, _ in got] == names and all(
            8 <= numbers <= 10 for _, numbers in got
        )
        expect(is_right, f"rank {context.rank} sends {got} {when}, should send {due}")
