"""Power normalisation (PN): division by a running root mean square. arXiv:2003.07845, section 4.

    z = x / sqrt(psi + eps)                         y = z weight + bias
    psi <- psi + (1 - alpha) (mean x^2 - psi)       after the forward
    g' = g weight - nu z                            dx = g' / sqrt(psi + eps)
    nu <- nu + (1 - beta) mean(g' z)                after the backward, with psi as in the forward

psi (`running_square`) and nu are per channel. No mean is subtracted. The gradient is the paper's
approximation: nu follows what the derivative through the batch's mean square would take. Its update
is nu (1 - (1 - beta) mean z^2) + (1 - beta) mean(g weight z) of the paper, algorithm 2.

Before all this every position is divided by the root mean square of a group of its channels, which
concerns no other sample (`scaling_groups`).

In the first `warmup` steps the batch's mean square takes the place of psi in z and dx; psi moves by
the weight 1 - alpha + alpha / t in step t, so that it is the first batch's after one step.

*Collectives*: two all-reduces of C+1 numbers. The first is waited for during the warm-up; after it,
neither. Both are applied before the next training forward.

Group scaling, the warm-up and the mask come from the authors' code (sIncerass/powernorm). Deviations
from that code: after the warm-up dx has psi, as in the paper, where the code has the mean square of
the batch; nu is 1 - beta times the code's; with a mask both means are over the elements that count,
while the code takes the one in the gradient over all, padding included; psi still has the warm-up's
weight in its last step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm.errors import InputError
from syncnorm.family.late_sums import keep
from syncnorm.family.layer import PlainBatchNorm
from syncnorm.family.mean_square import SquareNorm, check_steps
from syncnorm.family.passes import by_own_rms
from syncnorm.family.surrogate_gradient import Call, mean_of, square_of


class PowerNorm(SquareNorm):
    """Power normalisation over the batches of all workers, of x (N, C, *S).

    Args:
        num_features: channels C.
        eps: added to mean squares.
        momentum: 1 - alpha, weight of a batch in psi; None: psi is the average over all batches.
        affine: True for a weight and a bias per channel.
        gradient_momentum: 1 - beta, weight of a batch in nu.
        warmup: steps that divide by the batch's own mean square.
        scaling_groups: groups of channels whose root mean square each position is divided by first;
            0: none, then evaluation is an affine map by channel.
        options: `sync`, `process_group`, `device` and `dtype`, see `FamilyLayer`.
    """

    nu: Tensor
    gradient_momentum: float
    warmup: int

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        gradient_momentum: float = 0.1,
        warmup: int = 10000,
        scaling_groups: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, **options)
        if not 0 < gradient_momentum <= 1:
            raise InputError(
                f"`gradient_momentum` must be in (0, 1], got {gradient_momentum}. It is the weight "
                "of a batch."
            )
        check_steps("warmup", warmup)
        if scaling_groups < 0 or (scaling_groups and num_features % scaling_groups):
            raise InputError(
                f"`scaling_groups` must divide num_features = {num_features}, got {scaling_groups}. "
                "Pass 1 for one group, or 0 for none."
            )
        self.gradient_momentum, self.warmup = gradient_momentum, warmup
        self.scaling_groups = scaling_groups
        self.register_buffer("nu", torch.zeros_like(self.running_square))

    def extra_repr(self) -> str:
        """Describe the arguments."""
        return (
            f"{super().extra_repr()}, gradient_momentum={self.gradient_momentum}, "
            f"warmup={self.warmup}, scaling_groups={self.scaling_groups}"
        )

    def prepare(self, x: Tensor) -> Tensor:
        if not self.scaling_groups:
            return x
        grouped = x.unflatten(1, (self.scaling_groups, -1))
        return by_own_rms(grouped, (2,), self.eps).flatten(1, 2)

    def begin(self, sums: Tensor) -> Call:
        is_frozen = self.has_frozen_statistics
        # Looked at before anything is sent: a buffer that is looked at waits.
        nu = self.nu.to(torch.float64, copy=True)
        if self.is_warming_up(self.warmup):
            total = self.pool(sums, "moments")
            square = square_of(total)
            if not is_frozen:
                self._follow_square(total, is_warming_up=True)
        else:
            square = self.running_square.to(torch.float64, copy=True)
            if not is_frozen:
                self.late.send(
                    sums, self, "moments", partial(self._follow_square, is_warming_up=False)
                )
        squares_of_z = sums[:-1] / (square + self.eps)

        def correction(local: Tensor) -> Tensor:
            if not is_frozen:
                corrected = torch.cat([local - nu * squares_of_z, sums[-1:]])
                self.late.send(corrected, self, "gradients", self._follow_gradient)
            return nu

        return Call(square, correction)

    def _follow_square(self, total: Tensor, is_warming_up: bool) -> None:
        step = self.num_batches_tracked + 1
        rate = self.rate(step)
        if is_warming_up and self.momentum is not None:
            rate = rate + (1 - rate) / step
        moved = torch.lerp(self.running_square.double(), mean_of(total), rate)
        keep(self, total, running_square=moved, num_batches_tracked=step.double())

    def _follow_gradient(self, total: Tensor) -> None:
        keep(self, total, nu=self.nu + self.gradient_momentum * mean_of(total))

    def take(self, layer: _BatchNorm) -> None:
        super().take(layer)
        if self.scaling_groups:
            # Of values that are scaled first the batch norm knows nothing.
            self.running_square.fill_(1)

    def as_batch_norm(self) -> PlainBatchNorm | None:
        return None if self.scaling_groups else super().as_batch_norm()
