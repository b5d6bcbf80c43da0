"""Derf, an error function in place of a normalisation layer. arXiv:2512.10938.

    y = erf(alpha x + shift) weight + bias

alpha and shift are one parameter each for all elements.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from syncnorm.family.plain.dynamic_tanh import DynamicTanh


class Derf(DynamicTanh):
    """An error function with a learnable slope and shift, for x (N, C, *S).

    Args:
        num_features: channels C.
        alpha: initial slope.
    """

    shift: nn.Parameter

    def __init__(self, num_features: int, alpha: float = 0.5) -> None:
        super().__init__(num_features, alpha)
        self.shift = nn.Parameter(torch.zeros(1))

    def squash(self, x: Tensor) -> Tensor:
        """Apply the function of single elements."""
        return torch.erf(self.alpha.to(x.dtype) * x + self.shift.to(x.dtype))
