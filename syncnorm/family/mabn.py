"""Moving average batch normalisation (MABN). arXiv:2001.06838.

    z = x / sqrt(s2 + eps)                          y = r z weight + bias
    g = r weight dL/dy                              dx = (g - c z) / sqrt(s2 + eps)

s2 and c are arithmetic means over the last M steps, of the mean square of x and of mean(g z);
before that, in the warm-up, the batch's own. r, a constant, makes y that of evaluation, which
divides by the root of `running_square`, within bounds (see `syncnorm.family.window`). No mean is
subtracted: the layer stands behind a convolution whose filters have mean 0 (`CentredWeight`).

*Collectives*: one all-reduce of C+1 numbers in each pass, which with `lagged` nobody waits for
after the warm-up.

The method is that of the authors' code (megvii-model/MABN), where bounds, warm-up and the 1000 steps
without r come from. Its window is M = the batch size to simulate / that of one worker; here q is of
all workers' samples. Deviation: an average over all past steps (`momentum=None`) is possible.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from syncnorm.family.window import Step, WindowNorm


class MABN(WindowNorm):
    """Moving average batch normalisation over the batches of all workers, of x (N, C, *S).

    Args:
        num_features: channels C.
        eps: added to mean squares.
        momentum: weight of a step in the running mean square; None: it is the average over all.
        affine: True for a weight and a bias per channel.
        window: M, steps that are averaged over, at least 2.
        warmup: steps that use the batch's own statistics; M do at least.
        renorm_after: steps before r counts.
        lagged: True for windows that end with the step before, which nobody waits for.
        options: `sync`, `process_group`, `device` and `dtype`, see `FamilyLayer`.
    """

    renorms_output: ClassVar[bool] = True

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.02,
        affine: bool = True,
        *,
        window: int = 16,
        warmup: int = 100,
        **options: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, window=window, warmup=warmup, **options
        )

    def average(self, squares: Tensor) -> Tensor:
        return squares.double().mean(0)

    def corrected(self, b: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        gradients = torch.where(step.slot, b, self.gradients.double())
        return torch.where(step.is_alone, b, gradients.mean(0)), {"gradients": gradients}

    def standing_correction(self) -> Tensor:
        return self.gradients.double().mean(0)


class CentredWeight(nn.Module):
    """A parametrization: each filter of a weight (out, in, *kernel) less its mean.

    Example:
        >>> from torch.nn.utils.parametrize import register_parametrization
        >>> layer = register_parametrization(nn.Conv2d(3, 8, 3), "weight", CentredWeight())
        >>> bool(layer.weight.mean((1, 2, 3)).abs().max() < 1e-6)
        True
    """

    def forward(self, weight: Tensor) -> Tensor:
        """Centre the weight."""
        return weight - weight.mean(tuple(range(1, weight.ndim)), keepdim=True)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Keep the weight, so that what is assigned is what is stored."""
        return weight
