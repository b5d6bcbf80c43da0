"""What layers share that divide by a root mean square, see `syncnorm.family.surrogate_gradient`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm import checks, ops, tracing
from syncnorm.comm import exchange, groups
from syncnorm.device import is_host
from syncnorm.errors import InputError
from syncnorm.family.late_sums import LateSums, is_faulty, mask_fault, same_buffers
from syncnorm.family.layer import FamilyLayer, PlainBatchNorm
from syncnorm.family.passes import affine
from syncnorm.family.pooled import pooled_moments, widened
from syncnorm.family.surrogate_gradient import Call, divide
from syncnorm.statistics import repeated
from syncnorm.statistics.buffers import CurrentBuffers
from syncnorm.undocumented import unseen_by_selective_checkpoint


def check_steps(name: str, steps: int, least: int = 0) -> None:
    """Raise InputError unless an argument is a number of steps, `least` or more."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < least:
        raise InputError(f"`{name}` must be a number of steps, at least {least}, got {steps!r}")


class SquareNorm(FamilyLayer):
    """A layer that divides x (N, C, *S) by a root mean square; abstract.

    The buffer `running_square`, of the mean square, takes the place of running mean and variance.
    """

    running_square: Tensor
    late: LateSums
    ones: ClassVar[frozenset[str]] = FamilyLayer.ones | {"running_square"}

    def __init__(
        self, num_features: int, eps: float, momentum: float | None, affine: bool, **options: Any
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, **options)
        self.register_buffer("running_square", torch.ones_like(self.running_var))
        del self.running_mean, self.running_var
        self.late = LateSums()
        CurrentBuffers.put_into(self, self.late)
        self._is_warmed_up = False
        self._forwards_left = 0
        """The number of forwards for which the warm-up goes on at least."""

    def message_sizes(self) -> list[int]:
        return [self.num_features + 1, self.num_features + 1]

    @unseen_by_selective_checkpoint
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise x.

        Args:
            x: (N, C, *S).
            mask: constant weights >= 0, broadcastable to (N, 1, *S), of the elements in the
                statistics of training; None: all 1.

        Raises:
            InputError: the mask does not broadcast.
            FaultError: on every worker, if a weight of one of them is negative or not finite; in
                the next training forward where nobody waits for the statistics of this one.
        """
        self.check(x)
        weights = None if mask is None else checks.expand_mask(mask, x)
        if not self.training:
            self.settle()
        wide = self.prepare(widened(x))
        return self.finish(self.standardized(wide, weights)).to(x.dtype)

    def prepare(self, x: Tensor) -> Tensor:
        """Transform x before all else."""
        return x

    def normalize(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        local = ops.local_sums(x, weights)

        @torch.no_grad()
        def first() -> Call:
            self.late.begin(self)
            check = same_buffers(self)
            call = self.begin(ops.message_of(local)[self.num_features :])

            def correction(local: Tensor) -> Tensor:
                check()
                return call.correction(local)

            return call._replace(correction=correction)

        call, _ = repeated.begin(self, first)
        return divide(x, local.mask, call, self.eps, self.gradient_scale)

    @abstractmethod
    def begin(self, sums: Tensor) -> Call:
        """Begin a training forward: send this worker's [sum w x^2, sum w], (C + 1,)."""

    def batch_statistics(
        self, x: Tensor, group: groups.Group | None, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Take a batch's count, and its mean square as `square`, with the gradient that it has."""
        batch = pooled_moments(x, [weights], group, self)
        return batch.count[0], {"square": batch.var[0] + batch.mean[0].square()}

    def evaluate(self, x: Tensor) -> Tensor:
        return affine(x, None, (self.running_square.double() + self.eps).rsqrt(), None)

    def is_warming_up(self, steps: int) -> bool:
        """True in the first `steps` training forwards that had samples, and for fake tensors."""
        if tracing.is_fake(self):
            return True
        # On other devices the counter is not looked at while it cannot tell anything new.
        is_due = not self._is_warmed_up and self._forwards_left <= 0
        if is_host(self.num_batches_tracked) or is_due:
            left = steps - int(self.num_batches_tracked)
            self._is_warmed_up, self._forwards_left = left <= 0, left
        self._forwards_left -= 1
        return not self._is_warmed_up

    def pool(self, sums: Tensor, kind: str) -> Tensor:
        """Sum over the workers, and wait for it; the last number is a count."""
        total = exchange.sum_(sums, self.group, kind, self.label)
        if is_faulty(total):
            raise mask_fault(self)
        return total

    @property
    def failure(self) -> exchange.Failure | None:
        return self.late.failure

    def settle(self) -> None:
        self.late.settle()

    def discard(self) -> None:
        self.settle()
        self._is_warmed_up, self._forwards_left = False, 0

    def take(self, layer: _BatchNorm) -> None:
        super().take(layer)
        if layer.running_mean is not None and layer.running_var is not None:
            self.running_square.copy_(layer.running_var + layer.running_mean.square())

    def as_batch_norm(self) -> PlainBatchNorm | None:
        square = self.running_square
        return PlainBatchNorm(torch.zeros_like(square), square, self.weight, self.bias)
