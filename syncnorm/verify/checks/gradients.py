"""Backward passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from syncnorm.verify.check import check
from syncnorm.verify.compare import expect, expect_close, expect_shards, expect_step, expect_sum
from syncnorm.verify.context import Context
from syncnorm.verify.oracle import Oracle, random_batch
from syncnorm.verify.steps import (
    check_steps,
    make_layer,
    my_shard,
    outcome,
    plainly,
    ragged,
    train_step,
)
from syncnorm.verify.under_test import Layer


@check("input-without-gradient", "weight and bias have their gradients where no input needs one")
def input_without_gradient(context: Context) -> None:
    sizes = ragged(context.world_size)
    check_steps(context, [random_batch(sum(sizes))], sizes, needs_grad=False)


@check(
    "gradient-needed-on-some",
    "inputs of some workers may need a gradient, of others not",
    workers=2,
)
def gradient_needed_on_some(context: Context) -> None:
    sizes = ragged(context.world_size)
    check_steps(
        context,
        [random_batch(sum(sizes), seed=seed) for seed in range(2)],
        sizes,
        needs_grad=context.rank > 0,
    )


@check(
    "gradient-needed-on-some-only",
    "also where there is no weight and no bias that needs one",
    needs="affine",
    workers=2,
)
def gradient_needed_on_some_only(context: Context) -> None:
    sizes = ragged(context.world_size)
    check_steps(
        context, [random_batch(sum(sizes))], sizes, needs_grad=context.rank > 0, affine=False
    )


@check("frozen-parameters", "the input has its gradient where weight and bias need none")
def frozen_parameters(context: Context) -> None:
    sizes = ragged(context.world_size)
    check_steps(
        context,
        [random_batch(sum(sizes))],
        sizes,
        prepare=lambda layer: layer.requires_grad_(False),
    )


@check("frozen-bias", "weight may have a gradient where bias has none")
def frozen_bias(context: Context) -> None:
    sizes = ragged(context.world_size)
    check_steps(
        context,
        [random_batch(sum(sizes))],
        sizes,
        prepare=lambda layer: layer.bias.requires_grad_(False),
    )


@check(
    "local-parameter-sums",
    "gradients of weight and bias are sums over the worker's own shard, for others to average",
)
def local_parameter_sums(context: Context) -> None:
    sizes = ragged(context.world_size)
    batch = random_batch(sum(sizes))
    got = train_step(context, make_layer(context, 4), batch, sizes)
    for rank, (step, c) in enumerate(zip(got, batch.cotangent.split(sizes), strict=True)):
        expect_close(
            f"gradient of bias on rank {rank}",
            step.parameters.get("bias"),
            c.sum([0, 2]),
            torch.float64,
        )


@check("gradients-accumulate", "a second backward pass adds to the gradients of the first")
def gradients_accumulate(context: Context) -> None:
    sizes = ragged(context.world_size)
    batch = random_batch(sum(sizes))
    layer = make_layer(context, 4)
    x, cotangent, _ = my_shard(context, batch, sizes)
    x.requires_grad_()
    y = layer(x)
    for _ in range(2):
        # The same graph twice: a renormalising layer has moved on after a forward.
        y.backward(cotangent, retain_graph=True)
    got = context.gather(outcome(layer, y, x.grad))
    truth = Oracle(context.under_test, 4, {}).step(batch, plainly)
    assert truth.grad_input is not None
    expect_shards(
        "input gradient, twice,",
        [s.grad_input for s in got],
        2 * truth.grad_input,
        sizes,
        torch.float64,
    )
    for name, grad in truth.parameters.items():
        assert grad is not None
        expect_sum(
            f"gradient of {name}, twice",
            [s.parameters.get(name) for s in got],
            2 * grad,
            torch.float64,
        )


@check("two-forwards-then-backward", "several forwards may come before their backward passes")
def two_forwards_then_backward(context: Context) -> None:
    sizes = ragged(context.world_size)
    check_steps(
        context,
        [random_batch(2 * sum(sizes))],
        [2 * n for n in sizes],
        _in_halves(sizes[context.rank]),
        truth=_in_parts(sizes),
    )


@check("used-twice", "a layer may be used twice in a forward, on its own output")
def used_twice(context: Context) -> None:
    sizes = ragged(context.world_size)
    check_steps(context, [random_batch(sum(sizes), seed=seed) for seed in range(2)], sizes, _twice)


@check("checkpoint", "activation checkpointing counts a batch once and changes no gradient")
def checkpointed(context: Context) -> None:
    _checkpointed(context, use_reentrant=False)


@check("checkpoint-reentrant", "so does its re-entrant kind")
def checkpointed_reentrant(context: Context) -> None:
    _checkpointed(context, use_reentrant=True)


@check(
    "no-grad",
    "a training forward under torch.no_grad() normalises by the whole batch and follows it",
)
def no_grad(context: Context) -> None:
    sizes = ragged(context.world_size)
    batch = random_batch(sum(sizes))
    layer = make_layer(context, 4)
    x, _, _ = my_shard(context, batch, sizes)
    with torch.no_grad():
        y = layer(x)
    expect(not y.requires_grad, "output needs a gradient under torch.no_grad()")
    got = context.gather(outcome(layer, y, None))
    truth = Oracle(context.under_test, 4, {}).step(batch, plainly)
    truth.parameters = {}
    expect_step(got, truth, sizes, torch.float64)


@check(
    "double-backward",
    "gradients of input, weight and bias can be differentiated once more: by input, weight and the "
    "output's gradient",
    needs="double backward",
)
def double_backward(context: Context) -> None:
    sizes = ragged(context.world_size)
    _differentiate_twice(context, sizes)
    if context.world_size > 1:
        _differentiate_twice(context, [*sizes[:-1], 0])


@check("compile", "torch.compile(fullgraph=True) changes no value", needs="compile")
def compiled(context: Context) -> None:
    sizes = ragged(context.world_size)

    def use(layer: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        return torch.compile(layer, fullgraph=True, backend="aot_eager")(x)

    check_steps(
        context,
        [random_batch(sum(sizes), seed=seed) for seed in range(2)],
        sizes,
        use,
        truth=plainly,
    )


def _twice(layer: Layer, x: Tensor, mask: Tensor | None) -> Tensor:
    return layer(torch.tanh(layer(x)))


def _in_halves(n: int):
    def use(layer: Layer, x: Tensor, mask: Tensor | None) -> Tensor:
        return torch.cat([layer(x[:n]), layer(x[n:])])

    return use


def _in_parts(sizes: list[int]):
    """The first halves of all shards are one batch, the second halves another."""
    starts = torch.tensor([0, *sizes]).cumsum(0)[:-1] * 2
    first = torch.cat([torch.arange(n) + start for n, start in zip(sizes, starts, strict=True)])
    second = torch.cat(
        [torch.arange(n) + start + n for n, start in zip(sizes, starts, strict=True)]
    )

    def use(layer: Layer, x: Tensor, mask: Tensor | None) -> Tensor:
        back = torch.cat([first, second]).argsort()
        return torch.cat([layer(x[first]), layer(x[second])])[back]

    return use


def _checkpointed(context: Context, use_reentrant: bool) -> None:
    def use(layer: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        y = checkpoint(layer, x, use_reentrant=use_reentrant)
        assert isinstance(y, Tensor)
        return y

    sizes = ragged(context.world_size)
    check_steps(
        context,
        [random_batch(sum(sizes), seed=seed) for seed in range(2)],
        sizes,
        use,
        truth=plainly,
    )


def _differentiate_twice(context: Context, sizes: list[int]) -> None:
    batch = random_batch(sum(sizes))
    v = random_batch(sum(sizes), seed=1).cotangent
    u, t = torch.randn(2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x, cotangent, _ = my_shard(context, batch, sizes)
    mine = [each.to(context.device) for each in (v.split(sizes)[context.rank], u, t)]
    got = context.gather(_second_derivatives(make_layer(context, 4), x, cotangent, mine))
    truth = _second_derivatives(
        Oracle(context.under_test, 4, {}), batch.x.clone(), batch.cotangent.clone(), [v, u, t]
    )
    by_x, by_weight, by_cotangent = zip(*got, strict=True)
    # Derivatives of derivatives: what rounding left in the first is magnified.
    how: dict[str, Any] = {"dtype": torch.float64, "factor": 10.0}
    expect_shards("second derivative by the input", by_x, truth[0], sizes, **how)
    expect_sum("second derivative by weight", by_weight, truth[1], **how)
    expect_shards(
        "second derivative by the output's gradient", by_cotangent, truth[2], sizes, **how
    )


def _second_derivatives(
    layer: Any, x: Tensor, cotangent: Tensor, directions: list[Tensor]
) -> list[Tensor]:
    """The gradients of sum v dx + sum u dweight + sum t dbias by x, weight and the cotangent.

    The directions are v, u and t.
    """
    x.requires_grad_()
    cotangent.requires_grad_()
    # What a layer leaves out counts as zeros, as that of an empty shard may be.
    unused: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(
        layer(x), (x, layer.weight, layer.bias), cotangent, create_graph=True, **unused
    )
    total = torch.stack([(d * grad).sum() for d, grad in zip(directions, first, strict=True)]).sum()
    second = torch.autograd.grad(total, (x, layer.weight, cotangent), **unused)
    return [grad.detach().cpu() for grad in second]
