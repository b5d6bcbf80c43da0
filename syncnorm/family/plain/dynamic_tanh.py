"""Dynamic tanh, in place of a normalisation layer. arXiv:2503.10622.

    y = tanh(alpha x) weight + bias

alpha is one parameter for all elements.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from syncnorm import checks
from syncnorm.family.passes import channels


class DynamicTanh(nn.Module):
    """A tanh with a learnable slope, for x (N, C, *S).

    Args:
        num_features: channels C.
        alpha: initial slope.
    """

    alpha: nn.Parameter
    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, num_features: int, alpha: float = 0.5) -> None:
        super().__init__()
        self.num_features = num_features
        self.alpha = nn.Parameter(torch.full((1,), alpha))
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Squash x, (N, C, *S)."""
        checks.check_input(x, self.num_features)
        y = self.squash(x) * channels(self.weight, x)
        return y + channels(self.bias, x)

    def squash(self, x: Tensor) -> Tensor:
        """Apply the function of single elements."""
        return torch.tanh(self.alpha.to(x.dtype) * x)

    def extra_repr(self) -> str:
        """Describe the arguments."""
        return f"{self.num_features}"
