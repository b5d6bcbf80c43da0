"""Per-channel moments: from raw sums to mean and variance, and into the running statistics.

    n = sum w        mean = sum w x / n        m2 = sum w (x - mean)^2        var = m2 / n

All in float64. Raw sums (the wire format) add over workers; everything else is derived from their
total.
"""

from __future__ import annotations

from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from syncnorm.device import is_host
from syncnorm.maths.precision import rounding


class Moments:
    """Weighted moments of C channels: an `Unread`, a `Packed` or a `Raw`.

    Attributes:
        count: total weight n, shape (), float64.
        mean: weighted mean, shape (C,), float64.
        m2: weighted sum of squared deviations from the mean, shape (C,), float64, >= 0.
        n: the count: a number on the CPU, which saves operators; elsewhere the tensor, unread.
    """

    count: Tensor
    n: float | Tensor
    mean: Tensor
    m2: Tensor
    has_several: bool = False
    """True if more than one value counts, as this worker knows without a look at the count."""
    rows: Tensor
    """What a kernel has made of them, set by the call: see `syncnorm.maths.kernels.composed`."""

    @cached_property
    def packed(self) -> tuple[Tensor, bool]:
        """All in one float64 tensor, shape (2C+1,), as device kernels take them.

        Either [mean, m2, n] and False, or [sum wx, sum wx^2, n] and True.
        """
        return torch.cat([self.mean, self.m2, self.count.view(1)]), False

    @property
    def var(self) -> Tensor:
        """Biased variance m2 / n, shape (C,); 0 where n = 0."""
        return self.m2 * reciprocal(self.n)

    def invstd(self, eps: float) -> Tensor:
        """1 / sqrt(var + eps), shape (C,); 0 where no value or a single one counts.

        The output there is the bias, and the gradient 0, rather than a rounding error times 1 /
        sqrt(eps).
        """
        n, invstd = self.n, torch.rsqrt(self.var + eps)
        if not isinstance(n, Tensor) and not n <= 1:
            return invstd
        return invstd.masked_fill((self.count <= 1) & (self.m2 == 0), 0.0)


class Unread(Moments):
    """Moments whose numbers are not there to be read: in code that is being compiled."""

    def __init__(self, count: Tensor, mean: Tensor, m2: Tensor) -> None:
        self.count: Tensor = count
        self.n: float | Tensor = count
        self.mean: Tensor = mean
        self.m2: Tensor = m2

    @classmethod
    def of_sums(cls, sums: Tensor) -> Self:
        """Moments from raw sums, as `Raw` takes them."""
        return cls(sums[-1], *_finish(sums, sums[-1]))


class Packed(Moments):
    """Moments [mean, m2, n] in one tensor, shape (2C+1,), float64; taken apart if somebody looks."""

    def __init__(self, packed: Tensor) -> None:
        self.packed = packed, False
        self.count: Tensor = packed[-1]
        self.n: float | Tensor = self.count

    @property
    def mean(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        packed, _ = self.packed
        return packed[: packed.numel() // 2]

    @property
    def m2(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        packed, _ = self.packed
        return packed[packed.numel() // 2 : -1]


class Raw(Moments):
    """Moments that are raw sums until somebody looks: kernels may finish them themselves.

    Raw sums lose digits with the square of mean/std: in float64 about 1e-16 * (mean/std)^2 of var.

    Args:
        sums: [sum wx (C), sum wx^2 (C), sum w (1)], shape (2C+1,), float64.
        has_several: see `Moments`.
    """

    def __init__(self, sums: Tensor, has_several: bool = False) -> None:
        self.packed = sums, True
        self.has_several = has_several
        self.count: Tensor = sums[-1]
        self.n: float | Tensor = self.count.item() if is_host(sums) else self.count

    @property
    def mean(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._finished[0]

    @property
    def m2(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._finished[1]

    @cached_property
    def _finished(self) -> Tensor | tuple[Tensor, Tensor]:
        rows = getattr(self, "rows", None)
        return _finish(self.packed[0], self.n) if rows is None else rows


class Traced(Unread):
    """Moments in front of a tracer of operators: see `syncnorm.tracing`."""


def reciprocal(count: float | Tensor) -> float | Tensor:
    """1 / count, and 0 where count = 0. NaN stays NaN: a fault must not pass for an empty batch."""
    if not isinstance(count, Tensor):
        return 0.0 if count == 0 else 1.0 / count
    return torch.where(count == 0, count, count.reciprocal())


def _finish(sums: Tensor, n: float | Tensor) -> tuple[Tensor, Tensor]:
    """mean and m2."""
    channels = (sums.numel() - 1) // 2
    total, squares, _ = sums.split((channels, channels, 1))
    mean = total * reciprocal(n)
    m2 = (squares - total * mean).clamp(min=0.0)
    if isinstance(n, Tensor) or n <= 1:
        m2 = torch.where((m2 <= rounding(m2.dtype) * squares) & (n <= 1), 0.0, m2)
    return mean, m2


def average_factor(
    num_batches_tracked: Tensor | None, batch: Moments, momentum: float | None
) -> float | Tensor:
    """Count the batch, in place; returns the weight of its statistics in the running ones.

    An empty batch is not counted. The weight is `momentum`, or 1 / num_batches_tracked where
    `momentum` is None (cumulative average).
    """
    if num_batches_tracked is not None:
        num_batches_tracked += batch.n > 0
    if momentum is not None:
        return momentum
    assert num_batches_tracked is not None, "a cumulative average needs its counter"
    return 1.0 / num_batches_tracked.to(batch.count.dtype).clamp(min=1.0)


def update_running_mean_(running_mean: Tensor, batch: Moments, factor: float | Tensor) -> None:
    """running_mean += factor * (mean - running_mean), in place.

    Not changed where n = 0, or NaN, which is a fault.
    """
    blend_(running_mean, batch.mean, factor, batch.n > 0)


def update_running_var_(running_var: Tensor, batch: Moments, factor: float | Tensor) -> None:
    """running_var += factor * (m2 / (n - 1) - running_var), in place.

    Weights are frequencies. Not changed where n <= 1.
    """
    blend_(running_var, batch.m2 * reciprocal(batch.n - 1.0), factor, batch.n > 1)


def blend_(running: Tensor, value: Tensor, factor: float | Tensor, where: bool | Tensor) -> None:
    """running += factor * (value - running) where `where`, computed in float64.

    On a CPU the bits are those of the native library: workers with it and without must have the
    same buffers. On CUDA no value is read on the host.
    """
    wide = running.to(value.dtype)
    blended = _lerp(wide, value, factor) if is_host(wide) else torch.lerp(wide, value, factor)
    if isinstance(where, Tensor):
        running.copy_(torch.where(where, blended, wide))
    elif where:
        running.copy_(blended)


def _lerp(a: Tensor, b: Tensor, factor: float | Tensor) -> Tensor:
    """a + factor * (b - a), and b itself where the factor is 1, each operation rounded by itself.

    Some processors fuse two of them in `torch.lerp`.
    """
    if isinstance(factor, Tensor):
        return torch.where(factor < 0.5, a + factor * (b - a), b - (b - a) * (1.0 - factor))
    return a + factor * (b - a) if factor < 0.5 else b - (b - a) * (1.0 - factor)
