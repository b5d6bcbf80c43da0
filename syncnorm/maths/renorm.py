"""Batch renormalisation (Ioffe 2017, arXiv:1702.03275): r, d and the schedule of their bounds.

    sigma = sqrt(running_var + eps)        sigma_B = sqrt(var + eps)
    r = clip(sigma_B / sigma, 1 / r_max, r_max)
    d = clip((mean - running_mean) / sigma, -d_max, d_max)
    y = ((x - mean) / sigma_B * r + d) * weight + bias

r and d are constants to the gradient, so this is batch normalisation with weight * r and bias +
weight * d.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from syncnorm.errors import InputError
from syncnorm.maths.moments import Moments, blend_
from syncnorm.maths.precision import sum_dtype

# The step at which the paper's baseline reaches its best accuracy, and so the length of "the
# paper's run".
PAPER_STEPS = 130_000


@dataclass(frozen=True)
class RenormSchedule:
    """Bounds of r and d as functions of the training step: none, then linear ramps, then constant.

        r_max(step) = 1 up to warmup_steps, then linear to r_max at r_steps, then r_max
        d_max(step) = 0 up to warmup_steps, then linear to d_max at d_steps, then d_max

    r_max = 1 and d_max = 0 is plain batch normalisation. A ramp of no length is a switch: at
    warmup_steps the bound is in force. The defaults are the paper's.

    Args:
        r_max: final bound of r, >= 1; may be infinite where its ramp has no length.
        d_max: final bound of d, >= 0; likewise.
        warmup_steps: steps of plain batch normalisation, >= 0.
        r_steps: step at which r's ramp ends, >= warmup_steps.
        d_steps: step at which d's ramp ends, >= warmup_steps.

    Raises:
        InputError: a bound or a step is out of range, or a ramp ends before it starts.

    Example:
        >>> [t.item() for t in RenormSchedule().at(torch.tensor(25_000))]
        [2.142857142857143, 5.0]

    References:
        Ioffe 2017, section 4.1.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    warmup_steps: int = 5_000
    r_steps: int = 40_000
    d_steps: int = 25_000

    def __post_init__(self) -> None:
        if not self.r_max >= 1:
            raise InputError(
                f"`r_max` must be >= 1, got {self.r_max}. r_max = 1 leaves the scale uncorrected."
            )
        if not self.d_max >= 0:
            raise InputError(
                f"`d_max` must be >= 0, got {self.d_max}. d_max = 0 leaves the mean uncorrected."
            )
        for name in ("warmup_steps", "r_steps", "d_steps"):
            if not isinstance(getattr(self, name), Integral):
                raise InputError(
                    f"`{name}` must be an integer, got {getattr(self, name)!r}. It is a number of "
                    "training steps."
                )
        if not self.warmup_steps >= 0:
            raise InputError(
                f"`warmup_steps` must be >= 0, got {self.warmup_steps}. 0 starts the ramps at once."
            )
        for name, end, bound in (
            ("r_steps", self.r_steps, self.r_max),
            ("d_steps", self.d_steps, self.d_max),
        ):
            if not end >= self.warmup_steps:
                raise InputError(
                    f"`{name}` must be >= warmup_steps = {self.warmup_steps}, got {end}. "
                    "It is the step at which the ramp ends, counted from the start."
                )
            if bound == float("inf") and end > self.warmup_steps:
                raise InputError(
                    f"`{name}` must be warmup_steps = {self.warmup_steps} where the bound is "
                    f"infinite, got {end}. "
                    "A ramp to infinity has no values; use RenormSchedule.switch."
                )

    @classmethod
    def constant(cls, r_max: float, d_max: float) -> RenormSchedule:
        """The same bounds at every step."""
        return cls.switch(0, r_max, d_max)

    @classmethod
    def switch(cls, at: int, r_max: float, d_max: float) -> RenormSchedule:
        """Plain batch normalisation before step `at`, these bounds from then on."""
        return cls(r_max, d_max, warmup_steps=at, r_steps=at, d_steps=at)

    def scaled(self, total_steps: int) -> RenormSchedule:
        """This schedule for a run of `total_steps`, as it would be for the paper's 130,000.

        Raises:
            InputError: `total_steps` is less than 1.
        """
        if total_steps < 1:
            raise InputError(
                f"`total_steps` must be >= 1, got {total_steps}. It is the length of the run."
            )
        steps = (
            round(n * total_steps / PAPER_STEPS)
            for n in (self.warmup_steps, self.r_steps, self.d_steps)
        )
        return RenormSchedule(self.r_max, self.d_max, *steps)

    def at(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """(r_max, d_max) at `step`, an integer tensor; float64, with no value read on the host."""
        since = step.to(sum_dtype(step.device)) - self.warmup_steps
        return (
            self._ramp(since, 1.0, self.r_max, self.r_steps),
            self._ramp(since, 0.0, self.d_max, self.d_steps),
        )

    __call__ = at

    def _ramp(self, since: Tensor, start: float, end: float, end_step: int) -> Tensor:
        length = end_step - self.warmup_steps
        is_over = since >= length
        if length == 0:
            return torch.full_like(since, start).masked_fill(is_over, end)
        ramp = start + (end - start) * (since / length).clamp(0.0, 1.0)
        # The last value is put in rather than computed: start + (end - start) may round to beyond
        # the bound.
        return ramp.clamp(max=end).masked_fill(is_over, end)


class Correction(NamedTuple):
    """r and d of a batch, and what they refer to."""

    r: Tensor
    """Shape (C,), float64; constant to the gradient, as is d."""
    d: Tensor
    running_mean: Tensor
    """Before the batch, as is the variance."""
    running_var: Tensor
    r_max: Tensor
    d_max: Tensor


def correction(
    batch: Moments,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    r_max: Tensor,
    d_max: Tensor,
) -> tuple[Tensor, Tensor]:
    """r and d against the running statistics, each (C,), float64.

    Where nothing was counted r = 1 and d = 0.
    """
    sigma = torch.sqrt(running_var.to(batch.mean.dtype) + eps)
    r = torch.sqrt(batch.var + eps) / sigma
    d = (batch.mean - running_mean.to(batch.mean.dtype)) / sigma
    r = torch.where(batch.count == 0, 1.0, torch.minimum(torch.maximum(r, 1.0 / r_max), r_max))
    d = torch.where(batch.count == 0, 0.0, torch.minimum(torch.maximum(d, -d_max), d_max))
    return r, d


def update_running_std_(
    running_var: Tensor, batch: Moments, eps: float, factor: float | Tensor
) -> None:
    """Average the standard deviation, as the paper does, and store it as a variance, in place.

        sigma += factor * (sigma_B - sigma)        running_var = max(sigma^2 - eps, 0)

    sigma_B is from the biased variance. n <= 1 leaves it as it is.
    """
    sigma, sigma_batch = _root(running_var.to(batch.mean.dtype) + eps), _root(batch.var + eps)
    sigma = sigma + factor * (sigma_batch - sigma)
    blend_(running_var, (sigma.square() - eps).clamp(min=0.0), 1.0, batch.n > 1)


def _root(x: Tensor) -> Tensor:
    """sqrt(x), with the bits of the native library: see `syncnorm.maths.moments.blend_`.

    Those of `torch.sqrt` are a vendor's on some processors, and not always the nearest.
    """
    return x.rsqrt().reciprocal()
