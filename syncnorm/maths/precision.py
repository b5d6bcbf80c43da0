"""The types of half precision, and the type of sums and coefficients on a device."""

from __future__ import annotations

import torch
from torch import Tensor

HALF_TYPES = (torch.bfloat16, torch.float16)


# Apple's GPUs.
_WITHOUT_FLOAT64 = ("mps",)


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no float64."""
    if device.type in _WITHOUT_FLOAT64:
        return torch.float32
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return torch.float32
    return torch.float64


def for_sums(t: Tensor) -> Tensor:
    """t in the type of sums on its device."""
    return t.to(sum_dtype(t.device))


def rounding(dtype: torch.dtype) -> float:
    """The share of sum w x^2 that m2 of a single value (n <= 1) may have of rounding alone.

    A single value has no variance, but seems to have one where its weight is no whole number. Of
    several values no variance is too small to count.
    """
    return 16 * torch.finfo(dtype).eps
