"""Fixup initialisation of residual networks without normalisation. arXiv:1901.09321, section 3.

With L residual branches, of m layers with weights each:

1. The classification layer, and the last layer of each branch, are 0.
2. The other layers of branches are initialised by He's rule, and times L^(-1 / (2m - 2)).
3. Each branch has a scalar multiplier, from 1; in front of each convolution, linear layer and
   activation stands a scalar bias, from 0.

`fixup_` does 1 and 2. `ScalarScale` and `ScalarBias` are for 3, where the network is written. As in
github.com/hongyi-zhang/Fixup, He's rule counts a layer's outputs, and layers outside of branches
are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from syncnorm.errors import InputError

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def fixup_(branches: Sequence[Sequence[nn.Module]], classifier: nn.Linear) -> None:
    """Initialise residual branches and the classification layer, in place.

    Args:
        branches: of all residual branches of the network, the layers with weights in the order of
            the forward pass, without those of the shortcut. A branch of one layer is set to 0.
        classifier: the last layer.

    Raises:
        InputError: there is no branch, one is empty, or has something else than convolutions and linear layers.

    Example:
        >>> branch = [torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 4, 3)]
        >>> fixup_([branch], torch.nn.Linear(4, 10))
        >>> branch[1].weight.abs().max().item()
        0.0
    """
    if not branches:
        raise InputError(
            "`branches` must hold the residual branches, got none: the classification layer alone "
            "would become 0. Name each branch's layers with weights."
        )
    for branch in branches:
        if not branch or not all(isinstance(layer, _LAYERS) for layer in branch):
            names = [type(layer).__name__ for layer in branch]
            raise InputError(
                f"`branches` must hold convolutions and linear layers, got a branch of {names}. "
                "Name each branch's layers with weights, in the order of the forward pass."
            )
        for layer in branch[:-1]:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")  # pyright: ignore[reportArgumentType]
            with torch.no_grad():
                layer.weight.mul_(len(branches) ** (-1 / (2 * len(branch) - 2)))  # pyright: ignore[reportCallIssue]
        _zero_(branch[-1])
    _zero_(classifier)


def _zero_(layer: nn.Module) -> None:
    for parameter in layer.parameters(recurse=False):
        nn.init.zeros_(parameter)


class ScalarScale(nn.Module):
    """A scalar multiplier, from 1."""

    scale: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x."""
        return x * self.scale.to(x.dtype)


class ScalarBias(nn.Module):
    """A scalar bias, from 0."""

    bias: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Add to x."""
        return x + self.bias.to(x.dtype)
