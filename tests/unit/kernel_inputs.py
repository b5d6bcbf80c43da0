"""Inputs of kernels under test, and outputs that show what nobody has written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have outputs begin as NaN, so that an element that nobody writes is seen."""

    def poisoned(make):
        def full(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            return out.fill_(torch.nan if out.dtype.is_floating_point else 1)

        return full

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def facing(c: Tensor, x: Tensor) -> Tensor:
    """A (C,) tensor in float64, shaped to broadcast against x."""
    return c.double().view(-1, *[1] * (x.ndim - 2))
