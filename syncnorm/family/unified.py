"""Unified normalisation (UN). arXiv:2208.01313.

    z = x / sqrt(s2 + eps)                          y = z weight + bias
    g = r weight dL/dy                              dx = (g - c z) / sqrt(s2 + eps)
    c <- c + momentum (mean of the last M b - c)    before dx, b = mean(g z)

s2 is the geometric mean of the mean squares of x in the last M steps. In the warm-up the batch's own
mean square and its own b take the place of both means. A channel that is 0 throughout one of the
steps has the mean 0, and is divided by sqrt(eps) alone, as in the authors' code. r acts on the
gradient alone (see `syncnorm.family.window`). No mean is subtracted. Evaluation divides by the root
of `running_square`.

With `outlier_filtration` a step whose arithmetic mean A and geometric mean G over the window have
A - G > M V in some channel is an outlier. V is the unbiased variance of all square roots in the
window before it, (M, C) numbers. An outlier is normalised by its own q and corrected by its own b,
and in the windows the running values take its place. `running_square` and c do follow its q and b,
as in the authors' code. All of this is decided from sums over all workers, so all take the same
branch.

*Collectives*: one all-reduce of C+1 numbers in each pass, which with `lagged` nobody waits for after
the warm-up. The authors' windows hold the present step, hence the default.

The method is that of the authors' code (hikvision-research/Unified-Normalization). Deviations: the
gradient of the weight is the derivative, while the code multiplies it by r; the rule for outliers
waits until the window is full; the sum in b is over all outputs and divided by the number of
elements that count, while the code divides by that of all, padding included.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from syncnorm.family.window import Step, WindowNorm


class UnifiedNorm(WindowNorm):
    """Unified normalisation over the batches of all workers, of x (N, C, *S).

    Args:
        num_features: channels C.
        eps: added to mean squares.
        momentum: weight of a step in the running mean square, and in c; None: they are averages
            over all.
        affine: True for a weight and a bias per channel.
        window: M, steps that are averaged over, at least 2.
        warmup: steps without windows; the first M are, at least.
        renorm_after: steps before r counts.
        outlier_filtration: True to leave outliers out of the windows; the authors do for images.
        lagged: True for windows that end with the step before, which nobody waits for.
        options: `sync`, `process_group`, `device` and `dtype`, see `FamilyLayer`.
    """

    gradient: Tensor
    renorms_output: ClassVar[bool] = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        window: int = 4,
        warmup: int = 4000,
        outlier_filtration: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, window=window, warmup=warmup, **options
        )
        self.outlier_filtration = outlier_filtration
        self.register_buffer("gradient", torch.zeros_like(self.running_square))

    def extra_repr(self) -> str:
        """Describe the arguments."""
        return f"{super().extra_repr()}, outlier_filtration={self.outlier_filtration}"

    def average(self, squares: Tensor) -> Tensor:
        return squares.double().log().mean(0).exp()

    def is_outlier(self, squares: Tensor, before: Tensor) -> Tensor:
        if not self.outlier_filtration:
            return super().is_outlier(squares, before)
        gap = squares.mean(0) - self.average(squares)
        return (gap > self.window * before.sqrt().var()).any()

    def corrected(self, b: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        last = self.gradient.double()
        entry = torch.where(step.is_outlier, last, b)
        gradients = torch.where(step.slot, entry, self.gradients.double())
        mean = torch.where(step.is_alone, b, gradients.mean(0))
        gradient = torch.lerp(last, mean, self.rate(step.number))
        c = torch.where(step.is_outlier, mean, gradient)
        return c, {"gradients": gradients, "gradient": gradient}

    def standing_correction(self) -> Tensor:
        return self.gradient.to(torch.float64, copy=True)
