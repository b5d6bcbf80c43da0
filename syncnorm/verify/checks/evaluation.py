"""Evaluation mode."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncnorm.verify.check import check
from syncnorm.verify.collectives import counted
from syncnorm.verify.compare import expect, expect_same_bits
from syncnorm.verify.context import Context
from syncnorm.verify.oracle import random_batch
from syncnorm.verify.steps import make_layer, my_shard, ragged, train_step


@check("evaluation", "evaluation is F.batch_norm with the running statistics, to the bit")
def evaluation(context: Context) -> None:
    layer, x = _trained(context)
    expect_same_bits(
        f"output of rank {context.rank} in evaluation",
        layer(x).detach(),
        _by_torch(layer, x).detach(),
    )


@check("evaluation-float32", "also in float32 and for images")
def evaluation_float32(context: Context) -> None:
    layer, x = _trained(context, (4, 5, 3), torch.float32)
    expect_same_bits(
        f"output of rank {context.rank} in evaluation",
        layer(x).detach(),
        _by_torch(layer, x).detach(),
    )


@check("evaluation-gradient", "so is its gradient")
def evaluation_gradient(context: Context) -> None:
    layer, x = _trained(context)
    cotangent = random_batch(len(x), seed=5).cotangent.to(context.device)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    layer(ours).backward(cotangent)
    _by_torch(layer, theirs).backward(cotangent)
    assert ours.grad is not None
    assert theirs.grad is not None
    expect_same_bits(f"input gradient of rank {context.rank} in evaluation", ours.grad, theirs.grad)


@check("evaluation-silent", "evaluation exchanges nothing")
def evaluation_silent(context: Context) -> None:
    layer, x = _trained(context)
    with counted() as seen:
        layer(x.requires_grad_()).sum().backward()
    expect(
        not seen,
        f"rank {context.rank} made {len(seen)} exchange(s) in evaluation ({seen}), allowed 0",
    )


@check("evaluation-alone", "one worker may evaluate while the others do not", workers=2)
def evaluation_alone(context: Context) -> None:
    layer, x = _trained(context)
    if context.rank == 0:
        layer(x)
    context.gather(None)


@check("evaluation-changes-nothing", "evaluation leaves every buffer as it is")
def evaluation_changes_nothing(context: Context) -> None:
    layer, x = _trained(context)
    before = {name: b.clone() for name, b in layer.named_buffers()}
    layer(x)
    for name, value in layer.named_buffers():
        expect_same_bits(f"{name} of rank {context.rank} after evaluation", value, before[name])


@check("evaluation-empty", "a batch without samples can be evaluated")
def evaluation_empty(context: Context) -> None:
    layer, x = _trained(context)
    shape = tuple(layer(x[:0]).shape)
    expect(shape == (0, 4, 5), f"output of an empty batch has shape {shape}, should be (0, 4, 5)")


@check("evaluation-one-sample", "the output for a sample does not depend on the others with it")
def evaluation_one_sample(context: Context) -> None:
    layer, x = _trained(context)
    off = (layer(x)[:1] - layer(x[:1])).abs().max().item()
    expect(
        off <= 1e-12, f"output of a sample alone is {off:.1e} off that in a batch, allowed 1e-12"
    )


def _trained(
    context: Context, tail: tuple[int, ...] = (4, 5), dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, Tensor]:
    """A layer after a training step, now in evaluation, and a batch of this worker's own."""
    sizes = ragged(context.world_size)
    layer = make_layer(context, 4, dtype)
    train_step(context, layer, random_batch(sum(sizes), tail, dtype), sizes)
    x, _, _ = my_shard(
        context, random_batch(3 * context.world_size, tail, dtype, seed=1), [3] * context.world_size
    )
    return layer.eval(), x


def _by_torch(layer: nn.Module, x: Tensor) -> Tensor:
    mean, var, weight, bias = (
        getattr(layer, name) for name in ("running_mean", "running_var", "weight", "bias")
    )
    return F.batch_norm(x, mean, var, weight, bias, training=False, eps=1e-5)
