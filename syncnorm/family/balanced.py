"""Batch norm that balances the tasks of continual learning, AdaB2N. arXiv:2310.08855.

With n_t samples of task t in the batch and a parameter psi_t for each task:

    p_t = (exp(psi_t) + n_t) / sum over the tasks in the batch of (exp(psi) + n)
    w_i = p_t / n_t for a sample i of task t
    mean = sum_i w_i E_s x_i        var = sum_i w_i E_s (x_i - mean)^2
    y = (x - mean) / sqrt(var + eps) weight + bias

E_s is the average over a sample's positions. Running statistics follow mean and var, which is not
made unbiased, with the weight `momentum_at` of the step. The loss has a further term, here
`balance_loss`, that holds mean and var close to the running statistics; psi learns by both.

Deviation: in the authors' code a task that has been seen and has no sample in the batch keeps its
exp(psi) in the sum, as if it had a mean and a deviation of 0, and mean and var become too small.
Here tasks that are not in the batch have no part in p, so that the weights sum to 1. Both are the
same where every task is there, and a network need not be told of a task's end.

*Collectives*: one all-reduce of T(2C+2) numbers, the counts and sums of T tasks, and one in the
backward pass: the weights need the counts of all workers, and counts that went first would be a
second message to wait for. `balance_loss` has no more.

In evaluation psi has no effect, and a gradient of 0, as in training that of a task without samples:
DistributedDataParallel waits for a gradient of every parameter. So weight decay moves it there, too;
`psi.requires_grad_(False)` holds it.

Sources: the paper; github.com/lvyilin/AdaB2N.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from syncnorm import tracing
from syncnorm.errors import FaultError, InputError
from syncnorm.family.batch_norm import PooledBatchNorm
from syncnorm.family.momentum import momentum_at
from syncnorm.family.passes import sample_sums
from syncnorm.family.pooled import not_negative, pooled_sum
from syncnorm.recomputing import is_recomputing
from syncnorm.statistics import repeated


class BalancedBatchNorm(PooledBatchNorm):
    """Batch normalisation that weights tasks, over the batches of all workers.

    Args:
        num_features: channels C.
        num_tasks: tasks T, seen or to come.
        kappa: in [0, 1], from a cumulative average to an exponential one; see `momentum_at`.
        eps: added to variances.
        momentum: weight of a batch in an exponential average; None: a cumulative one.
        options: see `FamilyLayer`.
    """

    kappa: float
    num_tasks: int
    psi: nn.Parameter
    not_by_channel: ClassVar[frozenset[str]] = frozenset({"psi"})

    def __init__(
        self,
        num_features: int,
        num_tasks: int = 1,
        kappa: float = 1.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, **options)
        if num_tasks < 1:
            raise InputError(f"`num_tasks` must be at least 1, got {num_tasks}. Count all tasks.")
        if momentum is not None:
            momentum_at(1, momentum, kappa)  # checks them
        self.num_tasks, self.kappa = num_tasks, kappa
        self.psi = nn.Parameter(self.running_mean.new_zeros(num_tasks))
        self.tasks: Tensor | None = None
        """The tasks of the samples that come; see `tasks_of`."""
        self._batch: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, tasks: Tensor | None = None) -> Tensor:
        """Normalise x.

        Args:
            x: (N, C, *S).
            tasks: (N,), in 0 ... T-1; None: those of `tasks_of`, or else one task. Training only.

        Raises:
            FaultError: on every worker, if one of them has a task out of range, or another number
                of tasks than samples. (On CUDA the output is NaN instead, and the running
                statistics keep still.)
        """
        if tasks is None:
            return super().forward(x)
        with tasks_of(self, tasks):
            return super().forward(x)

    def normalize(self, x: Tensor) -> Tensor:
        """Normalise by the batch, its tasks balanced."""
        is_repeated = is_recomputing()
        if not is_repeated:
            self._batch = None
        # A forward may be repeated when `tasks_of` is over.
        tasks = repeated.same(self, lambda: self.tasks)
        count, values, first, second = self._task_sums(x, tasks)
        is_there = count > 0
        shares = (self.psi.double().exp() + count) * is_there
        shares = shares / shares.sum().clamp(min=1)
        weights = shares / count.clamp(min=1)
        mean, square = weights @ first, weights @ second
        var = not_negative(square - mean.square())
        if not is_repeated:
            self._batch = mean, var
        # A single value says nothing about scale.
        var_seen = torch.where(values.sum() > 1, var, self.running_var)
        self.follow(count.sum(), mean=mean, var=var_seen)
        return self.standardize(x, mean, var)

    def evaluate(self, x: Tensor) -> Tensor:
        """Normalise by the running statistics; psi has a gradient of 0."""
        mean = self.running_mean
        if torch.is_grad_enabled() and self.psi.requires_grad:
            # Not times 0, which is NaN for a psi that is not finite.
            mean = mean + torch.where(self.psi.new_zeros((), dtype=torch.bool), self.psi, 0).sum()
        return self.standardize(x, mean, self.running_var)

    def _task_sums(self, x: Tensor, tasks: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Count samples and values by task, (T,), and add each sample's means of x and x^2, (T, C).

        Samples without positions do not count.
        """
        is_right_shape = tasks is None or tasks.shape == (len(x),)
        if tasks is None or not is_right_shape:
            tasks = x.new_zeros(len(x), dtype=torch.int64)
        numbers = torch.arange(self.num_tasks, device=x.device)
        members = (tasks == numbers[:, None]).double()  # (T, N)
        positions = math.prod(x.shape[2:])
        first, second = sample_sums(x) / max(1, positions)
        # As NaN: whose tasks are wrong is known to that worker alone.
        is_wrong = (members.sum() != len(x)) | (not is_right_shape)
        count = (members * (positions > 0)).sum(1, keepdim=True).masked_fill(is_wrong, torch.nan)
        local = torch.cat([count, count * positions, members @ first, members @ second], 1)
        total = pooled_sum(local, self.group, self)
        channels = self.num_features
        count, values, first, second = total.split((1, 1, channels, channels), 1)
        if tracing.is_readable(count) and count[0].isnan():
            raise FaultError(
                f"`tasks` must be in 0 ... {self.num_tasks - 1}, one for each sample of x, in "
                f"{self.label}; some worker's are not. Nothing was updated."
            )
        return count.detach()[:, 0], values.detach(), first, second

    def balance_loss(self) -> Tensor:
        """Give the term of the loss that holds the last batch close to the running statistics.

            mean over channels of (mean - running_mean)^2 + (var - running_var)^2

        The running statistics have followed the batch, and are constants. Add it, times the lambda
        of the paper, to the loss of every worker: it is the same on all, and an average of
        gradients over the workers counts it once.

        Raises:
            InputError: no training forward came before, or gradients were off in it.
        """
        if self._batch is None:
            raise InputError(
                "`balance_loss` must follow a training forward, got none. Call the layer first."
            )
        mean, var = self._batch
        if torch.is_grad_enabled() and self.psi.requires_grad and not mean.requires_grad:
            raise InputError(
                "`balance_loss` must follow a forward that has a gradient, got one under `no_grad` "
                "or in a re-entrant checkpoint. Use `checkpoint(..., use_reentrant=False)`."
            )
        drift = (mean - self.running_mean).square() + (var - self.running_var).square()
        return drift.mean()

    def rate(self, step: Tensor) -> Tensor:
        """Weigh a step by its momentum."""
        if self.momentum is None:
            return super().rate(step)
        return momentum_at(step, self.momentum, self.kappa)

    def message_sizes(self) -> list[int]:
        """Count the numbers in each message of a training step, forward, then backward."""
        return 2 * [self.num_tasks * (2 * self.num_features + 2)]

    def __getstate__(self) -> dict[str, Any]:
        # What a step leaves has a graph, and cannot be copied; a copy is in no block of `tasks_of`.
        return {**super().__getstate__(), "_batch": None, "tasks": None}

    def extra_repr(self) -> str:
        """Describe the arguments."""
        return f"{super().extra_repr()}, num_tasks={self.num_tasks}, kappa={self.kappa}"


@contextmanager
def tasks_of(model: nn.Module, tasks: Tensor) -> Iterator[None]:
    """Tell all `BalancedBatchNorm` of a model the tasks, (N,), of the samples that it is given."""
    layers = [m for m in model.modules() if isinstance(m, BalancedBatchNorm)]
    before = [layer.tasks for layer in layers]
    for layer in layers:
        layer.tasks = tasks
    try:
        yield
    finally:
        for layer, tasks_before in zip(layers, before, strict=True):
            layer.tasks = tasks_before
