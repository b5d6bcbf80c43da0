"""Steps of a layer on the ranks of a pool, compared with the oracle of `syncnorm.verify`."""

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
from syncnorm.verify import oracle, ours
from syncnorm.verify.steps import fill, outcome, plainly

_NORM, _RENORM = ours()


@dataclass
class Outcome(oracle.Step):
    """The outcome of one training forward and backward pass, with its exchanges and strides."""

    exchanges: list[tuple[str, int]] = field(default_factory=list)
    strides: tuple[tuple[int, ...], ...] = ()


class Batch(oracle.Batch):
    """A whole batch, its mask and the cotangent of the output."""

    @classmethod
    def random(
        cls, shape: Sequence[int], dtype: torch.dtype, *, channels_last: bool = False, **how: Any
    ) -> Batch:
        """A batch of `oracle.random_batch`, of this shape and layout in memory."""
        made = oracle.random_batch(shape[0], shape[1:], dtype, **how)
        x = made.x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else made.x
        return cls(x, made.cotangent, made.mask)

    def shards(self, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        masks = [None] * len(sizes) if self.mask is None else shard(self.mask, sizes)
        return list(zip(shard(self.x, sizes), shard(self.cotangent, sizes), masks, strict=True))


def parameters(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight and a bias that are the same wherever they are made."""
    weight, bias = oracle.parameters(channels)
    return weight.to(dtype), bias.to(dtype)


def trained_statistics(channels: int) -> reference.RunningStatistics:
    """Running statistics some way off the batches', by channel."""
    return oracle.initial_statistics(_RENORM, channels)


def make_layer(
    channels: int, *, bounds: tuple[float, float] | None = None, **options: Any
) -> SyncNorm:
    """A SyncBatchNorm, or with bounds (r_max, d_max) a SyncBatchRenorm with trained statistics."""
    if bounds is None:
        return SyncBatchNorm(channels, **options)
    layer = SyncBatchRenorm(channels, schedule=RenormSchedule.constant(*bounds), **options)
    running = trained_statistics(channels)
    fill(layer, {"running_mean": running.mean, "running_var": running.var})
    return layer


def train_step(
    steps: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    options: dict[str, Any],
    group_ranks: Sequence[Sequence[int]] | None = None,
) -> list[Outcome]:
    """Make a layer on this rank, then a training forward and backward on each of its shards."""
    group = None
    if group_ranks is not None:
        made = [dist.new_group(list(ranks)) for ranks in group_ranks]
        mine = next(i for i, ranks in enumerate(group_ranks) if dist.get_rank() in ranks)
        group = made[mine]
    x = steps[0][0]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    layer = make_layer(x.shape[1], process_group=group, dtype=dtype, **options)
    fill(layer, dict(zip(("weight", "bias"), parameters(x.shape[1], dtype), strict=True)))
    return [one_step(layer, *step) for step in steps]


def one_step(
    layer: SyncNorm,
    x: Tensor,
    cotangent: Tensor,
    mask: Tensor | None,
    run: Callable[..., Tensor] | None = None,
) -> Outcome:
    """A training forward and backward; `run` is called instead of the layer, if given."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    with exchange.record() as exchanges:
        y = (layer if run is None else run)(x, mask)
        y.backward(cotangent)
    assert x.grad is not None
    return Outcome(
        **vars(outcome(layer, y, x.grad)),
        exchanges=[(e.kind, e.numel) for e in exchanges],
        strides=(x.stride(), y.stride(), x.grad.stride()),
    )


def oracle_steps(batches: Sequence[Batch], options: dict[str, Any]) -> list[oracle.Step]:
    """The oracle's steps on the whole batches."""
    # With the layers' own defaults for momentum.
    tested, momentum = (_RENORM, 0.01) if "bounds" in options else (_NORM, 0.1)
    truth = oracle.Oracle(tested, batches[0].x.shape[1], {"momentum": momentum, **options})
    return [truth.step(batch, plainly) for batch in batches]


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
    by_rank: Sequence[Sequence[oracle.Step]],
    batches: Sequence[Batch],
    sizes: Sequence[int],
    options: dict[str, Any] | None = None,
    factor: float = 1.0,
) -> None:
    """Compare every output, input gradient, parameter gradient and buffer of every rank and step."""
    for step, (expected, batch) in enumerate(
        zip(oracle_steps(batches, options or {}), batches, strict=True)
    ):
        got = [outcomes[step] for outcomes in by_rank]
        compare(got, expected, batch.x.dtype, sizes, f"step {step}", factor)


def compare(
    got: Sequence[oracle.Step],
    expected: oracle.Step,
    dtype: torch.dtype,
    sizes: Sequence[int],
    what: str,
    factor: float = 1.0,
) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # Judged against the whole tensor's scale: a shard may hold small values only.
    for name in ("y", "grad_input"):
        parts, whole = [getattr(step, name) for step in got], getattr(expected, name)
        assert [len(part) for part in parts] == list(sizes)
        assert_close(torch.cat(parts), whole, dtype, f"{what} {name}", factor)
    for name, truth in expected.parameters.items():
        parts = [step.parameters.get(name) for step in got]
        if truth is None:
            assert parts == [None] * len(parts)
        else:
            total = torch.stack([part.double() for part in parts]).sum(0)
            assert_close(total, truth, wide, f"{what} grad_{name}", factor)
    for step in got:
        assert step.buffers.keys() == expected.buffers.keys()
        for name, value in step.buffers.items():
            assert torch.equal(value, got[0].buffers[name]), f"{what} {name} differs between ranks"
            assert_close(value, expected.buffers[name], wide, f"{what} {name}", factor)
