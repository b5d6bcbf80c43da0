"""Online normalisation: each sample by the statistics of those before it. arXiv:1905.05894.

With mu_t and v_t the mean and variance of sample t over its positions, per channel, and decays a:

    y_t = (x_t - m) / sqrt(var + eps)               by m and var before the sample
    var <- a var + (1 - a) v_t + a (1 - a) (mu_t - m)^2          m <- a m + (1 - a) mu_t

and in the backward pass, in the same order, with b its decay and g_t = dL/dy_t:

    h_t = g_t - (1 - b) v y_t                       v <- v + mean(h_t y_t)
    dx_t = h_t / sqrt(var + eps) - (1 - b) u        u <- u + mean(dx_t)

so that gradients are orthogonal to 1 and y in the long run. Weight and bias follow, and then a guard
against errors of the estimates: `"layer_scaling"`, the paper's, divides a sample by its root mean
square over all channels and positions; `"clamp"`, that of the authors' later code
(Cerebras/online-normalization), clamps to [-5, 5].

Each worker goes through its own samples. After every step m, var, u and v become the averages over
the workers, weighted by the samples that each had in the step; var is the total
variance, mean var + mean m^2 - (mean m)^2. In between the workers' statistics differ. A recurrence
over all workers' samples in turn would make every worker wait for every other, for each sample.

*Collectives*: one all-reduce of 2C+1 numbers in each pass, which nobody waits for: they are applied
before the next training forward. What has moved meanwhile, by another call of the step, keeps its
move.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from syncnorm.autograd import ANCHOR
from syncnorm.comm import exchange
from syncnorm.errors import InputError
from syncnorm.family import online_recurrence
from syncnorm.family.batch_norm import PooledBatchNorm
from syncnorm.family.late_sums import LateSums, keep, same_buffers
from syncnorm.family.layer import PlainBatchNorm
from syncnorm.family.passes import affine, by_own_rms
from syncnorm.family.surrogate_gradient import mean_of, once_differentiated
from syncnorm.statistics import repeated
from syncnorm.statistics.buffers import CurrentBuffers

Guard = Literal["layer_scaling", "clamp"]
_LARGEST = 5.0


class Start(NamedTuple):
    """The averages with which a training forward begins."""

    mean: Tensor
    var: Tensor
    averages: bool
    """True if the workers average what they have at its end."""
    is_frozen: bool
    check: Callable[[], None]
    """Raises where the backward pass finds other buffers."""

    def for_repetition(self) -> Start:
        """Return itself: a repeated forward begins there, too."""
        return self


class OnlineNorm(PooledBatchNorm):
    """Online normalisation of x (N, C, *S), with averages over the workers.

    Args:
        num_features: channels C.
        eps: added to variances.
        momentum: 1 - a, weight of a sample in the running statistics.
        affine: True for a weight and a bias per channel.
        gradient_momentum: 1 - b, weight of a sample in the gradient's statistics.
        guard: "layer_scaling", "clamp", or None: nothing, then evaluation is an affine map by
            channel.
        options: `sync`, `process_group`, `device` and `dtype`, see `FamilyLayer`.
    """

    scales_at_once: ClassVar[bool] = False
    u: Tensor
    v: Tensor
    gradient_momentum: float
    late: LateSums

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.001,
        affine: bool = True,
        *,
        gradient_momentum: float = 0.01,
        guard: Guard | None = "layer_scaling",
        **options: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, **options)
        for name, value in (("momentum", momentum), ("gradient_momentum", gradient_momentum)):
            if value is None or not 0 < value < 1:
                raise InputError(
                    f"`{name}` must be in (0, 1), got {value}. It is the weight of a sample."
                )
        if guard not in ("layer_scaling", "clamp", None):
            raise InputError(f'`guard` must be "layer_scaling", "clamp" or None, got {guard!r}')
        self.gradient_momentum, self.guard = gradient_momentum, guard
        self.register_buffer("u", torch.zeros_like(self.running_mean))
        self.register_buffer("v", torch.zeros_like(self.running_mean))
        self._sent: deque[Tensor] = deque()
        """The gradients' averages that are under way, as this worker had them."""
        self.late = LateSums()
        CurrentBuffers.put_into(self, self.late)

    def extra_repr(self) -> str:
        """Describe the arguments."""
        return (
            f"{super().extra_repr()}, gradient_momentum={self.gradient_momentum}, "
            f"guard={self.guard!r}"
        )

    @property
    def has_common_statistics(self) -> bool:
        # Between two averages each worker has those of its own samples.
        return False

    def message_sizes(self) -> list[int]:
        return [2 * self.num_features + 1, 2 * self.num_features + 1]

    def normalize(self, x: Tensor) -> Tensor:
        start, is_repeated = repeated.begin(self, self._begin)
        y: Tensor = _Online.apply(x, self, start, is_repeated, ANCHOR)  # pyright: ignore[reportAssignmentType]
        # The backward pass keeps y, and a function in place may follow where nothing else does.
        return y.clone() if self.weight is None and self.guard is None else y

    @torch.no_grad()
    def _begin(self) -> Start:
        self.late.begin(self)
        averages = not self.has_frozen_statistics and self.group is not None
        mean, var = self.running_mean.double(), self.running_var.double()
        is_frozen = self.has_frozen_statistics
        return Start(mean.clone(), var.clone(), averages, is_frozen, same_buffers(self))

    def average_moments(self, samples: int) -> None:
        """Start to average mean and variance over the workers, by this one's samples."""
        mean, var = self.running_mean.double(), self.running_var.double()

        def follow(total: Tensor) -> None:
            m, square = mean_of(total).chunk(2)
            pooled = (square - m.square()).clamp(min=0)
            running_var = moved(self.running_var, var, pooled).clamp(min=0)
            # Before, whether another worker has samples is not known.
            self.num_batches_tracked.add_((total[-1] > 0).long())
            keep(
                self, total, running_mean=moved(self.running_mean, mean, m), running_var=running_var
            )

        self._send(samples, "moments", torch.cat([mean, var + mean.square()]), follow)

    def average_gradients(self, samples: int, sent: Tensor) -> None:
        """Start to average [u, v], (2C,), over the workers."""
        self._sent.append(sent)

        def follow(total: Tensor) -> None:
            now = torch.cat([self.u, self.v])
            average = mean_of(total)
            u, v = moved(now, sent, average).chunk(2)
            keep(self, total, u=u, v=v)
            while self._sent.popleft() is not sent:
                pass  # one whose sum came to nothing
            # What was sent before this has come, by later calls of the step, is still without it.
            new = torch.cat([self.u, self.v])
            for later in self._sent:
                shifted = torch.where(now == new, later, later + (average - sent))
                later.copy_(torch.where(now == later, new.double(), shifted))

        self._send(samples, "gradients", sent, follow)

    def _send(self, samples: int, kind: str, each: Tensor, apply: Callable[[Tensor], None]) -> None:
        self.late.send(samples * torch.cat([each, torch.ones_like(each[:1])]), self, kind, apply)

    def evaluate(self, x: Tensor) -> Tensor:
        return affine(x, self.running_mean, (self.running_var.double() + self.eps).rsqrt(), None)

    def finish(self, z: Tensor) -> Tensor:
        y = super().finish(z)
        if self.guard == "layer_scaling":
            return by_own_rms(y, tuple(range(1, y.ndim)), self.eps)
        return y if self.guard is None else y.clamp(-_LARGEST, _LARGEST)

    @property
    def failure(self) -> exchange.Failure | None:
        return self.late.failure

    def settle(self) -> None:
        self.late.settle()

    def discard(self) -> None:
        self.settle()

    def as_batch_norm(self) -> PlainBatchNorm | None:
        return super().as_batch_norm() if self.guard is None else None


class _Online(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: OnlineNorm, start: Start, is_repeated: bool, anchor: Tensor
    ) -> Tensor:
        assert layer.momentum is not None
        y, invstd, mean, var = online_recurrence.forward(
            x, start.mean, start.var, layer.momentum, layer.eps
        )
        ctx.save_for_backward(y, invstd)
        ctx.layer, ctx.start = layer, start
        if not (is_repeated or start.is_frozen):
            # Values that are not finite leave nothing.
            is_new = mean.isfinite().all() & var.isfinite().all()
            layer.running_mean.copy_(torch.where(is_new, mean, start.mean))
            layer.running_var.copy_(torch.where(is_new, var, start.var))
            if start.averages:
                layer.average_moments(len(x) if x.numel() else 0)
            elif x.numel():
                layer.num_batches_tracked.add_(1)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, invstd = ctx.saved_tensors
        layer: OnlineNorm = ctx.layer
        ctx.start.check()
        with torch.no_grad():
            scale = layer.gradient_scale
            # Taken from the dict, past what would wait for the message of the forward.
            kept_u, kept_v = (dict.__getitem__(layer._buffers, name) for name in ("u", "v"))
            grad_input, u, v = online_recurrence.backward(
                grad / scale, y, invstd, kept_u, kept_v, layer.gradient_momentum
            )
            grad_input = grad_input * scale
            if not ctx.start.is_frozen:
                # A step that gradient scaling gives up leaves nothing.
                is_new = u.isfinite().all() & v.isfinite().all()
                kept_u.copy_(torch.where(is_new, u, kept_u.double()))
                kept_v.copy_(torch.where(is_new, v, kept_v.double()))
                if ctx.start.averages:
                    samples = len(y) if y.numel() else 0
                    layer.average_gradients(samples, torch.cat([kept_u, kept_v]).double())
        return once_differentiated(grad_input, grad, y), None, None, None, None


def moved(now: Tensor, sent: Tensor, average: Tensor) -> Tensor:
    """Move a value, float64, by as much as what was sent has to move to its average."""
    # The average itself where nothing has moved, so that workers have the same bits.
    return torch.where(now == sent, average, now.double() + (average - sent))
