"""What the ranks do in the tests of a layer, and what the oracle says of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm import RenormSchedule, SyncBatchNorm, SyncBatchRenorm, reference
from syncnorm.comm import exchange
from syncnorm.module import SyncNorm
from syncnorm.testing import RankPool, assert_close, shard


@dataclass
class Outcome:
    """One training forward and backward of a layer, on one rank or of the oracle."""

    y: Tensor
    grad_input: Tensor
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    buffers: dict[str, Tensor]
    exchanges: list[tuple[str, int]] = field(default_factory=list)
    strides: tuple[tuple[int, ...], ...] = ()


@dataclass
class Batch:
    """A whole batch, its mask and the cotangent of the output."""

    x: Tensor
    cotangent: Tensor
    mask: Tensor | None = None

    @classmethod
    def random(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        mean: float = 1.0,
        std: float = 2.0,
        channels_last: bool = False,
        masked: bool = False,
        seed: int = 0,
    ) -> Batch:
        g = torch.Generator().manual_seed(seed)
        # Samples differ in mean, so that shards do, and local statistics cannot pass for pooled
        # ones.
        offset = torch.linspace(-1.0, 1.0, max(shape[0], 1), dtype=torch.float64)[: shape[0]]
        x = torch.randn(shape, generator=g, dtype=torch.float64) + offset.view(
            -1, *[1] * (len(shape) - 1)
        )
        x = (x * std + mean).to(dtype)
        if channels_last:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        mask = None
        if masked:
            mask = torch.randint(0, 3, (shape[0], 1, *shape[2:]), generator=g).to(torch.float32)
        cotangent = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        return cls(x, cotangent, mask)

    def shards(self, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        masks = [None] * len(sizes) if self.mask is None else shard(self.mask, sizes)
        return list(zip(shard(self.x, sizes), shard(self.cotangent, sizes), masks, strict=True))


def parameters(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight and a bias that are the same wherever they are made."""
    g = torch.Generator().manual_seed(99)
    weight = torch.rand(channels, generator=g, dtype=torch.float64) + 0.5
    bias = torch.randn(channels, generator=g, dtype=torch.float64)
    return weight.to(dtype), bias.to(dtype)


def make_layer(
    channels: int, *, bounds: tuple[float, float] | None = None, **options: Any
) -> SyncNorm:
    """A SyncBatchNorm, or with bounds (r_max, d_max) a SyncBatchRenorm whose running statistics are
    not the initial.
    """
    if bounds is None:
        return SyncBatchNorm(channels, **options)
    layer = SyncBatchRenorm(channels, schedule=RenormSchedule.constant(*bounds), **options)
    running = trained_statistics(channels)
    layer.running_mean.copy_(running.mean)
    layer.running_var.copy_(running.var)
    return layer


def trained_statistics(channels: int) -> reference.RunningStatistics:
    """Running statistics some way off the batches', by channel."""
    spread = torch.linspace(-0.5, 1.5, channels, dtype=torch.float64)
    return reference.RunningStatistics(spread + 0.5, 4.0 * torch.exp(spread))


def train_step(
    steps: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    options: dict[str, Any],
    group_ranks: Sequence[Sequence[int]] | None = None,
) -> list[Outcome]:
    """On one rank: a new layer, then a training forward and backward on each of its shards."""
    group = None
    if group_ranks is not None:
        made = [dist.new_group(list(ranks)) for ranks in group_ranks]
        mine = next(i for i, ranks in enumerate(group_ranks) if dist.get_rank() in ranks)
        group = made[mine]
    x = steps[0][0]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    layer = make_layer(x.shape[1], process_group=group, dtype=dtype, **options)
    if layer.affine:
        with torch.no_grad():
            weight, bias = parameters(x.shape[1], dtype)
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    return [one_step(layer, *step) for step in steps]


def one_step(
    layer: SyncNorm,
    x: Tensor,
    cotangent: Tensor,
    mask: Tensor | None,
    run: Callable[..., Tensor] | None = None,
) -> Outcome:
    """A training forward and backward; `run`: what to call instead of the layer itself, such as its
    compiled form.
    """
    layer.zero_grad()
    x = x.detach().requires_grad_()
    with exchange.record() as exchanges:
        y = (layer if run is None else run)(x, mask)
        y.backward(cotangent)
    assert x.grad is not None
    return Outcome(
        y.detach(),
        x.grad,
        None if layer.weight is None else layer.weight.grad,
        None if layer.bias is None else layer.bias.grad,
        {name: b.clone() for name, b in layer.named_buffers()},
        [(e.kind, e.numel) for e in exchanges],
        (x.stride(), y.stride(), x.grad.stride()),
    )


def oracle_steps(batches: Sequence[Batch], options: dict[str, Any]) -> list[Outcome]:
    """The same steps on the whole batches, in float64, in one process."""
    channels = batches[0].x.shape[1]
    dtype = torch.float64 if batches[0].x.dtype == torch.float64 else torch.float32
    options = dict(options)
    bounds, is_affine = options.pop("bounds", None), options.pop("affine", True)
    is_tracking = options.pop("track_running_stats", True)
    running = (
        trained_statistics(channels) if bounds else reference.RunningStatistics.initial(channels)
    )
    outcomes = []
    for batch in batches:
        weight = bias = None
        if is_affine:
            weight, bias = (p.double().requires_grad_() for p in parameters(channels, dtype))
        x = batch.x.double().detach().requires_grad_()
        if bounds is None:
            kept = running if is_tracking else None
            y = reference.batch_norm(x, weight, bias, mask=batch.mask, running=kept, **options)
        else:
            r_max, d_max = bounds
            y = reference.batch_renorm(
                x,
                weight,
                bias,
                mask=batch.mask,
                running=running,
                r_max=r_max,
                d_max=d_max,
                **options,
            )
        y.backward(batch.cotangent.double())
        buffers = {}
        if is_tracking:
            buffers = {
                "running_mean": running.mean,
                "running_var": running.var,
                "num_batches_tracked": torch.tensor(running.num_batches_tracked),
            }
        grad = x.grad if x.grad is not None else torch.zeros_like(x)
        outcomes.append(
            Outcome(
                y.detach(), grad, weight.grad if weight is not None else None,
                bias.grad if bias is not None else None, buffers,
            )
        )  # fmt: skip
    return outcomes


def run_steps(
    pool: RankPool,
    batches: Sequence[Batch],
    sizes: Sequence[int],
    options: dict[str, Any] | None = None,
) -> list[list[Outcome]]:
    """The batches in shards of these sizes through the pool: outcomes by rank, then by step."""
    by_rank = list(zip(*(b.shards(sizes) for b in batches), strict=True))
    return pool.run_each(train_step, [(list(steps), options or {}) for steps in by_rank])


def check_against_oracle(
    by_rank: Sequence[Sequence[Outcome]],
    batches: Sequence[Batch],
    sizes: Sequence[int],
    options: dict[str, Any] | None = None,
    factor: float = 1.0,
) -> None:
    """Every output, input gradient, parameter gradient and buffer of every rank and step."""
    for step, (expected, batch) in enumerate(
        zip(oracle_steps(batches, options or {}), batches, strict=True)
    ):
        got = [outcomes[step] for outcomes in by_rank]
        compare(got, expected, batch.x.dtype, sizes, f"step {step}", factor)


def compare(
    got: Sequence[Outcome],
    expected: Outcome,
    dtype: torch.dtype,
    sizes: Sequence[int],
    what: str,
    factor: float = 1.0,
) -> None:
    y = shard(expected.y, sizes)
    grad_input = shard(expected.grad_input, sizes)
    buffers_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    # Judged against the whole tensor's scale: a shard may hold small values only.
    for name, parts in (("y", [o.y for o in got]), ("grad_input", [o.grad_input for o in got])):
        whole = expected.y if name == "y" else expected.grad_input
        assert [p.shape for p in parts] == [p.shape for p in (y if name == "y" else grad_input)]
        assert_close(torch.cat(parts), whole, dtype, f"{what} {name}", factor)
    for name in ("grad_weight", "grad_bias"):
        parts = [getattr(o, name) for o in got]
        if getattr(expected, name) is None:
            assert parts == [None] * len(parts)
        else:
            total = torch.stack([p.double() for p in parts]).sum(0)
            assert_close(total, getattr(expected, name), buffers_dtype, f"{what} {name}", factor)
    for outcome in got:
        assert outcome.buffers.keys() == expected.buffers.keys()
        for name, value in outcome.buffers.items():
            assert torch.equal(value, got[0].buffers[name]), f"{what} {name} differs between ranks"
            assert_close(value, expected.buffers[name], buffers_dtype, f"{what} {name}", factor)
