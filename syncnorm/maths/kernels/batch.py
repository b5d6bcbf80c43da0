"""The batch that a device's kernels normalise by, and what renormalisation corrects it towards."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from syncnorm.maths.renorm import RenormSchedule


class Batch(Protocol):
    """The moments of a batch: see `syncnorm.maths.moments.Moments`."""

    count: Tensor
    mean: Tensor
    m2: Tensor

    @property
    def var(self) -> Tensor: ...

    @property
    def packed(self) -> tuple[Tensor, bool]: ...

    def invstd(self, eps: float) -> Tensor: ...


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
