"""Per-channel numbers, (C,), beside a tensor (N, C, *S)."""

from __future__ import annotations

from torch import Tensor


def facing(c: Tensor, x: Tensor) -> Tensor:
    """Shape values of channels, (C,), to be broadcast against x (N, C, *S), or (N, C)."""
    return c.view(-1, *[1] * (x.ndim - 2))


def all_but_channels(x: Tensor) -> list[int]:
    """List the dimensions of x (N, C, *S) that a sum by channel goes over."""
    return [0, *range(2, x.ndim)]
