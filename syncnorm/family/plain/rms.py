"""Root mean square normalisation over the channels of a position. arXiv:1910.07467.

    y = x / sqrt(mean over channels of x^2 + eps) weight

torch's RMSNorm takes the last dimensions of its input; here channels are the second.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from syncnorm import checks
from syncnorm.family.passes import channels
from syncnorm.family.pooled import widened


class ChannelRMSNorm(nn.Module):
    """Root mean square normalisation of x (N, C, *S) over C.

    Args:
        num_features: channels C.
        eps: added to mean squares.
    """

    eps: float
    num_features: int
    weight: nn.Parameter

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        checks.check_hyperparameters(num_features, eps, None)
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.weight = nn.Parameter(torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, (N, C, *S)."""
        checks.check_input(x, self.num_features)
        wide = widened(x)
        inverse = (wide.square().mean(1, keepdim=True) + self.eps).rsqrt()
        return (wide * inverse * channels(self.weight, wide)).to(x.dtype)

    def extra_repr(self) -> str:
        """Describe the arguments."""
        return f"{self.num_features}, eps={self.eps}"
