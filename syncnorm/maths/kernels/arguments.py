"""What kernels that finish statistics themselves are given, and what they tell of their writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor
from torch.autograd.graph import increment_version

if TYPE_CHECKING:
    from syncnorm.maths.renorm import RenormSchedule


class Scheduled(NamedTuple):
    """Bounds of r and d by a schedule that the kernel itself looks up."""

    step: Tensor
    """An integer, shape ()."""
    schedule: RenormSchedule


class Reference(NamedTuple):
    """The reference of batch renormalisation's r and d."""

    running_mean: Tensor
    running_var: Tensor
    bounds: tuple[Tensor, Tensor] | Scheduled
    """r_max and d_max, float64, shape ()."""


def mark_written(*tensors: Tensor | None) -> None:
    """Tell autograd, and whoever asks for a tensor's version, what a kernel has written in place."""
    # A loop: a comprehension would be a Python call, in every forward.
    written: list[Tensor] = []
    for t in tensors:
        if t is not None and not t.is_inference():
            written.append(t)
    increment_version(written)
