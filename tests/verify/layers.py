"""Layers of other people's: some that pool nothing, for one worker, and one that pools."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import Tensor, nn


class OneProcess(nn.BatchNorm2d):
    """torch's own, for any shape."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class Pooled(OneProcess):
    """The moments in one sum that torch can differentiate; no running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        axes = [0, *range(2, input.ndim)]
        count = input.new_full((self.num_features,), input.numel() / self.num_features)
        sums = torch.stack([input.sum(axes), input.square().sum(axes), count])
        total, squares, n = differentiable.all_reduce(sums, group=dist.group.WORLD)
        mean = total / n
        scale = self.weight / (squares / n - mean.square() + self.eps).sqrt()
        shift = self.bias - mean * scale
        shape = (1, -1, *[1] * (input.ndim - 2))
        return input * scale.view(shape) + shift.view(shape)


class Breaks(OneProcess):
    """Cannot be traced in one piece, and differentiated once only."""

    def forward(self, input: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(_Once.apply(input))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad
