"""Steps of a layer on shards, compared with the oracle on the whole batch: most checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from syncnorm.verify.compare import expect, expect_step
from syncnorm.verify.context import Context
from syncnorm.verify.oracle import (
    Batch,
    Oracle,
    Step,
    Use,
    initial_statistics,
    parameters,
    random_batch,
)

Layout = Callable[[Tensor], Tensor]


def plainly(layer: Callable[..., Tensor], x: Tensor, mask: Tensor | None) -> Tensor:
    """Call the layer once."""
    return layer(x) if mask is None else layer(x, mask)


def ragged(workers: int) -> list[int]:
    """Uneven numbers of samples."""
    return [(3, 1, 4, 2)[rank % 4] for rank in range(workers)]


def make_layer(
    context: Context, channels: int, dtype: torch.dtype = torch.float64, **options: Any
) -> nn.Module:
    """Make the layer under test on this worker's device, with the oracle's parameters and buffers.

    For inputs of a half type it is float32, as under autocast.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layer = context.under_test.make(channels, **options).to(context.device, wide)
    fill(layer, dict(zip(("weight", "bias"), parameters(channels), strict=True)))
    if context.under_test.is_renorm:
        running = initial_statistics(context.under_test, channels)
        fill(layer, {"running_mean": running.mean, "running_var": running.var})
    return layer


def fill(layer: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy values into a layer's parameters and buffers of these names, where it has them."""
    with torch.no_grad():
        for name, value in values.items():
            own = getattr(layer, name, None)
            if isinstance(own, Tensor):
                own.copy_(value)


def train_step(
    context: Context,
    layer: nn.Module,
    batch: Batch,
    sizes: Sequence[int],
    use: Use = plainly,
    *,
    layout: Layout = torch.clone,
    needs_grad: bool = True,
) -> list[Step]:
    """A forward and a backward pass on this worker's shard; the outcomes of all ranks.

    Args:
        context: this worker's.
        layer: in training.
        batch: the whole one.
        sizes: samples of each rank.
        use: how the layer is called.
        layout: brings the shard into a layout in memory.
        needs_grad: whether this rank's input needs a gradient.
    """
    x, cotangent, mask = my_shard(context, batch, sizes)
    x = layout(x).detach().requires_grad_(needs_grad)
    layer.zero_grad()
    y = use(layer, x, mask)
    if y.requires_grad:
        y.backward(layout(cotangent))
    # The gradient of an empty shard is nothing, and may be missing.
    is_missing = needs_grad and x.grad is None and x.numel() > 0
    expect(not is_missing, f"input gradient of rank {context.rank} is missing")
    return context.gather(outcome(layer, y, x.grad))


def my_shard(
    context: Context, batch: Batch, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """This worker's x, cotangent and mask, on its device."""
    x, cotangent = (
        t.split(list(sizes))[context.rank].to(context.device) for t in (batch.x, batch.cotangent)
    )
    mask = (
        None
        if batch.mask is None
        else batch.mask.split(list(sizes))[context.rank].to(context.device)
    )
    return x.clone(), cotangent.clone(), mask


def outcome(layer: nn.Module, y: Tensor, grad_input: Tensor | None) -> Step:
    """Collect the outcome of a step, on the CPU."""
    grads = {
        name: None if p.grad is None else p.grad.detach().cpu().clone()
        for name, p in layer.named_parameters()
    }
    buffers = {name: b.detach().cpu().clone() for name, b in layer.named_buffers()}
    return Step(
        y.detach().cpu(), None if grad_input is None else grad_input.detach().cpu(), grads, buffers
    )


def check_steps(
    context: Context,
    batches: Sequence[Batch],
    sizes: Sequence[int],
    use: Use = plainly,
    *,
    truth: Use | None = None,
    factor: float = 1.0,
    layout: Layout = torch.clone,
    needs_grad: bool = True,
    prepare: Callable[[nn.Module], object] = id,
    **options: Any,
) -> list[list[Step]]:
    """Make steps on shards of the batches, each of which must equal the oracle's on the batch.

    Args:
        context: this worker's.
        batches: one for each step.
        sizes: samples of each rank.
        use: how the layer is called.
        truth: how the oracle is called, if not in the same way.
        factor: on the tolerance.
        layout, needs_grad: as for `train_step`.
        prepare: changes the layer before the first step.
        options: of the layer.

    Returns:
        The outcomes of each step, by rank.

    Raises:
        CheckFailed: something differs.
    """
    x = batches[0].x
    layer = make_layer(context, x.shape[1], x.dtype, **options)
    prepare(layer)
    oracle = Oracle(context.under_test, x.shape[1], options)
    steps = []
    for number, batch in enumerate(batches):
        got = train_step(context, layer, batch, sizes, use, layout=layout, needs_grad=needs_grad)
        expected = oracle.step(batch, truth or use)
        expected.parameters = {
            k: v for k, v in expected.parameters.items() if _wants_gradient(layer, k)
        }
        what = f"step {number + 1}: " if len(batches) > 1 else ""
        expect_step(got, expected, sizes, x.dtype, factor=factor, what=what)
        steps.append(got)
    return steps


def check_three_steps(context: Context, **options: Any) -> None:
    """Make three steps of a layer with these options on uneven shards, as `check_steps` does."""
    sizes = ragged(context.world_size)
    batches = [random_batch(sum(sizes), seed=seed) for seed in range(3)]
    check_steps(context, batches, sizes, **options)


def _wants_gradient(layer: nn.Module, name: str) -> bool:
    return any(n == name and p.requires_grad for n, p in layer.named_parameters())
