"""Layers of other people's, that pool nothing: for one worker."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class OneProcess(nn.BatchNorm2d):
    """torch's own, for any shape."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


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
