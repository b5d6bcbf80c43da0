"""What MABN and UnifiedNorm share: averages over a window of steps, in both passes.

With q the batch's mean square, in step t = 1, 2, ..., and M steps in the window:

    z = x / sqrt(s2 + eps)       s2 = average of the last M q; q itself while t <= M or t < warmup
    dx = (g - c z) / sqrt(s2 + eps)                    c = average of the last M b, b = mean(g z)
    r = clip(sqrt((s2 + eps) / (running + eps)), 1/5, 5); 1 while t <= max(renorm_after, warmup)
    running <- running + momentum (s2 - running)                                    after r

A method says which averages, and what becomes of r. The windows hold the present step, too: so a
message is waited for in both passes. With `lagged`, after the warm-up, the windows that a step uses
end with the step before, and nothing is waited for; what is kept moves as otherwise, before the
next training forward. Steps without a sample anywhere are none.

*Collectives*: one all-reduce of C+1 numbers in each pass.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from syncnorm.family.late_sums import keep
from syncnorm.family.mean_square import SquareNorm, check_steps
from syncnorm.family.surrogate_gradient import Call, mean_of

_MAX_R = 5.0


class Step(NamedTuple):
    """A step, by the sums over all workers: what it enters into the windows."""

    number: Tensor
    """t, ()."""
    slot: Tensor
    """(M, 1), True for its row."""
    is_alone: Tensor
    """(): True if it uses its own statistics."""
    is_outlier: Tensor
    """(): True if it leaves none in the windows."""
    squares: Tensor
    """(M, C), the window with it."""
    square: Tensor
    """(C,), s2."""


class WindowNorm(SquareNorm):
    """A layer that divides by an average over a window of steps; abstract.

    Args:
        num_features: channels C.
        eps: added to mean squares.
        momentum: weight of a step in the running mean square; None: it is the average over all.
        affine: True for a weight and a bias per channel.
        window: M, at least 2.
        warmup: steps without windows, which use the batch's own numbers; the first M are, at least.
        renorm_after: steps before r counts.
        lagged: True for windows that end with the step before.
        options: `sync`, `process_group`, `device` and `dtype`, see `FamilyLayer`.
    """

    squares: Tensor
    gradients: Tensor
    renorms_output: ClassVar[bool]
    """True if r multiplies the output; else it multiplies g alone."""
    renorm_after: int
    warmup: int
    window: int

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        *,
        window: int,
        warmup: int,
        renorm_after: int = 1000,
        lagged: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, **options)
        check_steps("window", window, 2)
        check_steps("warmup", warmup)
        check_steps("renorm_after", renorm_after)
        self.window, self.warmup, self.renorm_after = window, warmup, renorm_after
        self.lagged = lagged
        for name in ("squares", "gradients"):
            self.register_buffer(name, self.running_square.new_zeros(window, num_features))

    def extra_repr(self) -> str:
        """Describe the arguments."""
        return (
            f"{super().extra_repr()}, window={self.window}, warmup={self.warmup}, "
            f"renorm_after={self.renorm_after}, lagged={self.lagged}"
        )

    @abstractmethod
    def average(self, squares: Tensor) -> Tensor:
        """Average a window of mean squares, (M, C), over its steps."""

    def is_outlier(self, squares: Tensor, before: Tensor) -> Tensor:
        """Find whether a step is one, (), from the windows with it and before it, (M, C)."""
        return torch.zeros((), dtype=torch.bool, device=squares.device)

    @abstractmethod
    def corrected(self, b: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Find c, (C,), and what the buffers become, from the b of a step, (C,)."""

    @abstractmethod
    def standing_correction(self) -> Tensor:
        """Find c, (C,), from the buffers alone."""

    def begin(self, sums: Tensor) -> Call:
        if self.lagged and not self.is_warming_up(max(self.warmup - 1, self.window)):
            return self._begin_lagged(sums)
        is_frozen = self.has_frozen_statistics
        total = self.pool(sums, "moments")
        step = self._enter(total)
        r = torch.where(step.is_outlier, 1.0, self._renorm(step.square, step.number))
        if not is_frozen:
            self._keep_step(total, step)

        def correction(local: Tensor) -> Tensor:
            total = self.pool(torch.cat([local, sums[-1:]]), "gradients")
            c, buffers = self.corrected(mean_of(total), step)
            if not is_frozen:
                keep(self, total, **buffers)
            return c

        return self._call(step.square, r, correction)

    def _begin_lagged(self, sums: Tensor) -> Call:
        is_frozen, square, c = (
            self.has_frozen_statistics,
            self.average(self.squares),
            self.standing_correction(),
        )
        r = self._renorm(square, self.num_batches_tracked + 1)
        entered: list[Step] = []

        def enter(total: Tensor) -> None:
            entered.append(self._enter(total))
            self._keep_step(total, entered[0])

        def follow(total: Tensor) -> None:
            # Applied after the forward's, which may have been at fault.
            for step in entered:
                keep(self, total, **self.corrected(mean_of(total), step)[1])

        def correction(local: Tensor) -> Tensor:
            if not is_frozen:
                self.late.send(torch.cat([local, sums[-1:]]), self, "gradients", follow)
            return c

        if not is_frozen:
            self.late.send(sums, self, "moments", enter)
        return self._call(square, r, correction)

    def _call(self, square: Tensor, r: Tensor, correction: Any) -> Call:
        return Call(square, correction, *((r, None) if self.renorms_output else (None, r)))

    def _enter(self, total: Tensor) -> Step:
        """Find what a step enters into the windows, from the sums of all workers."""
        q, before = mean_of(total), self.squares.double()
        number = self.num_batches_tracked + 1
        slot = torch.arange(self.window, device=q.device)[:, None] == number % self.window
        squares = torch.where(slot, q, before)
        is_alone = (number <= self.window) | (number < self.warmup)
        is_outlier = ~is_alone & self.is_outlier(squares, before)
        squares = torch.where(slot & is_outlier, self.running_square, squares)
        is_alone = is_alone | is_outlier
        square = torch.where(is_alone, q, self.average(squares))
        # Where nothing counts z is 0.
        square = torch.where(total[-1] > 0, square, torch.inf)
        return Step(number, slot, is_alone, is_outlier, squares, square)

    def _keep_step(self, total: Tensor, step: Step) -> None:
        running = torch.lerp(self.running_square.double(), step.square, self.rate(step.number))
        keep(
            self,
            total,
            squares=step.squares,
            running_square=running,
            num_batches_tracked=step.number.double(),
        )

    def _renorm(self, square: Tensor, number: Tensor) -> Tensor:
        r = ((square + self.eps) / (self.running_square.double() + self.eps)).sqrt()
        is_over = number > max(self.renorm_after, self.warmup)
        return torch.where(is_over, r.clamp(1 / _MAX_R, _MAX_R), 1.0)
