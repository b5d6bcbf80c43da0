"""Batches, and the oracle's steps on them: float64, one process, the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from syncnorm import reference
from syncnorm.verify.under_test import BOUNDS, Layer, LayerUnderTest

Use = Callable[[Layer, Tensor, Tensor | None], Tensor]
"""A use of a layer: from the layer, x and mask to the output whose gradient is taken."""


@dataclass(frozen=True)
class Batch:
    """A whole batch on the CPU: x and the gradient of its output (N, C, *S), mask (N, 1, *S)."""

    x: Tensor
    cotangent: Tensor
    mask: Tensor | None = None


@dataclass
class Step:
    """The outcome of a training forward and backward pass of a shard or a batch, on the CPU."""

    y: Tensor
    grad_input: Tensor | None
    parameters: dict[str, Tensor | None]
    buffers: dict[str, Tensor] = field(default_factory=dict)


def random_batch(
    rows: int,
    tail: Sequence[int] = (4, 5),
    dtype: torch.dtype = torch.float64,
    *,
    mean: float = 1.0,
    std: float = 2.0,
    masked: bool = False,
    seed: int = 0,
) -> Batch:
    """A batch whose samples, so also shards, differ in mean: local statistics fail every check."""
    g = torch.Generator().manual_seed(seed)
    shape = (rows, *tail)
    offset = torch.linspace(-1.0, 1.0, max(rows, 1), dtype=torch.float64)[:rows]
    x = torch.randn(shape, generator=g, dtype=torch.float64) + offset.view(-1, *[1] * len(tail))
    mask = torch.randint(0, 3, (rows, 1, *tail[1:]), generator=g).float() if masked else None
    cotangent = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    return Batch((x * std + mean).to(dtype), cotangent, mask)


def parameters(channels: int) -> tuple[Tensor, Tensor]:
    """A weight and a bias that are the same wherever they are made, exact in float32."""
    g = torch.Generator().manual_seed(99)
    weight = torch.rand(channels, generator=g) + 0.5
    return weight.double(), torch.randn(channels, generator=g).double()


def initial_statistics(under_test: LayerUnderTest, channels: int) -> reference.RunningStatistics:
    """The statistics at the start: of a renormalising layer some way off the batches'."""
    if not under_test.is_renorm:
        return reference.RunningStatistics.initial(channels)
    spread = torch.linspace(-0.5, 1.5, channels, dtype=torch.float64).float().double()
    return reference.RunningStatistics(spread + 0.5, (4.0 * torch.exp(spread)).float().double())


class Oracle:
    """The whole batch in one process; called like a layer.

    Args:
        under_test: the layer whose equations are meant.
        channels: C.
        options: as the layer got them.
    """

    bounds: Any | None
    running_average: Any
    eps: Any
    momentum: Any
    bias: Tensor | None
    weight: Tensor | None

    def __init__(self, under_test: LayerUnderTest, channels: int, options: dict[str, Any]) -> None:
        self.running: reference.RunningStatistics | None = initial_statistics(under_test, channels)
        self.bounds = options.get("bounds", BOUNDS) if under_test.is_renorm else None
        self.running_average = options.get("running_average", "std")
        self.eps, self.momentum = options.get("eps", 1e-5), options.get("momentum", 0.1)
        self.weight = self.bias = None
        if options.get("affine", True):
            self.weight, self.bias = (p.requires_grad_() for p in parameters(channels))
        if not options.get("track_running_stats", True):
            self.running = None

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise in training, and update the running statistics."""
        common: dict[str, Any] = {"mask": mask, "eps": self.eps, "momentum": self.momentum}
        if self.bounds is None:
            return reference.batch_norm(x, self.weight, self.bias, running=self.running, **common)
        assert self.running is not None
        r_max, d_max = self.bounds
        common |= {"r_max": r_max, "d_max": d_max, "running_average": self.running_average}
        return reference.batch_renorm(x, self.weight, self.bias, running=self.running, **common)

    def step(self, batch: Batch, use: Use) -> Step:
        """A forward and a backward pass."""
        x = batch.x.double().detach().requires_grad_()
        for p in (self.weight, self.bias):
            if p is not None:
                p.grad = None
        y = use(self, x, batch.mask)
        y.backward(batch.cotangent.double())
        grads = {
            name: None if p is None else p.grad
            for name, p in (("weight", self.weight), ("bias", self.bias))
        }
        grad_input = torch.zeros_like(x) if x.grad is None else x.grad
        return Step(y.detach(), grad_input, grads, self.buffers())

    def buffers(self) -> dict[str, Tensor]:
        """The running statistics under BatchNorm's names."""
        if self.running is None:
            return {}
        count = torch.tensor(self.running.num_batches_tracked)
        return {
            "running_mean": self.running.mean,
            "running_var": self.running.var,
            "num_batches_tracked": count,
        }

    def folded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias with which batch normalisation gives this oracle's output.

        To be asked before the step.
        """
        assert self.weight is not None
        assert self.bias is not None
        weight, bias = self.weight.detach(), self.bias.detach()
        if self.bounds is None:
            return weight, bias
        assert self.running is not None
        r_max, d_max = self.bounds
        _, mean, var = reference.moments(x)
        sigma = (self.running.var + self.eps).sqrt()
        r = ((var + self.eps).sqrt() / sigma).clip(1 / r_max, r_max)
        d = ((mean - self.running.mean) / sigma).clip(-d_max, d_max)
        return weight * r, bias + weight * d
