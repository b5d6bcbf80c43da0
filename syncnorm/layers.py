"""The layers: their statistics are those of the whole batch, however it is sharded.

A training forward is three steps, in `syncnorm.ops`:

    local = local_sums(x, mask, ...)       this worker's sum wx, sum wx^2, sum w: one pass over x
    statistic = ...                        all workers' sums, by one all-reduce: mean and variance
    y, _ = normalize_batch(x, ...)         one pass over x; backward: one all-reduce

Where to look on:

    module.py      the base class: arguments, state dicts, `train_forward`, which calls the three
    statistics/    the middle step: one file for each `sync`, and forwards that are repeated
    ops.py         the three operations, for layers and functions; the two all-reduces are in
                   `pooled_statistic` (forward) and `PooledMeans.totals` (backward)
    fused.py       the gradient where kernels go through all of a call: native C, Triton
    autograd.py    the same in a few operators, to read first (SYNCNORM_NATIVE=0 takes this way on
                   a CPU), and the gradient's gradient
    maths/         formulas, and the kernels that touch x: maths/kernels/__init__.py chooses
    comm/          process groups, and the all-reduce: `exchange.sum_` (shared.py within a machine)

Renormalisation is the same with r and d folded into weight and bias: `ops.fold`. In evaluation
neither exchanges anything: `inference.py`, torch's own batch norm. CONTRIBUTING.md has the words
that are used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from syncnorm import checks, ops
from syncnorm.comm import groups
from syncnorm.errors import InputError
from syncnorm.maths import kernels
from syncnorm.maths.lagged import Lagged
from syncnorm.maths.renorm import RenormSchedule
from syncnorm.module import SyncNorm
from syncnorm.ops import LocalSums, Statistic

Schedule = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From a step, an integer tensor of shape (), to (r_max, d_max)."""


class SyncBatchNorm(SyncNorm):
    """Batch normalisation with statistics pooled over the workers.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    *Statistics*: per channel over every element of every worker in `process_group`, weighted by
    `mask`; the biased variance normalises, the unbiased one (by the global count n) goes into
    `running_var`. n = 1 gives y = bias and leaves `running_var`; n = 0 changes no buffer. In
    evaluation the running statistics are used, exactly as `torch.nn.BatchNorm2d` uses them, without
    communication.

    *Collectives*: in training, with `sync="batch"` and more than one worker, one all-reduce of 2C+2
    float64 numbers forward and one of as many backward. Every worker must take part, also one whose
    batch is empty. The first training forward makes a process group for statistics (`prepare_ddp`
    makes it earlier).

    *Gradients*: of weight and bias local sums, which DistributedDataParallel averages.

    State dicts are those of `torch.nn.BatchNorm1d/2d/3d` (with five buffers more under
    `sync="lagged"`). Input of 2 or more dimensions, on CPU and CUDA.

    Args:
        num_features: C, at least 1.
        eps: added to the variance, > 0.
        momentum: weight of the new value in the running statistics, in [0, 1]; None: cumulative
            average.
        affine: whether to learn weight and bias.
        track_running_stats: whether to keep running statistics; without them evaluation uses the
            local batch.
        process_group: the workers to pool over; None: all of them. A group, or a rule such as
            "node" or 2: see `syncnorm.groups`.
        device, dtype: of parameters and buffers.
        bias: whether an affine layer also learns the bias.
        sync: "batch" pools the statistics of each batch; "running" normalises by the local batch
            and pools the running statistics of all layers in one hidden exchange; "lagged"
            normalises by an average of pooled statistics one step old (a `Lagged` changes its rates
            and guard); "none" keeps everything local. "running" and "lagged" need `prepare_ddp`.

    Raises:
        InputError: an argument breaks its rule.

    Example:
        >>> layer = SyncBatchNorm(3)
        >>> layer(torch.randn(8, 3, 4, 4)).shape
        torch.Size([8, 3, 4, 4])

    References:
        Ioffe and Szegedy, Batch Normalization, arXiv:1502.03167.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: groups.Spec = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        sync: str | Lagged = "batch",
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            process_group,
            device,
            dtype,
            bias=bias,
            sync=sync,
        )


class SyncBatchRenorm(SyncNorm):
    """Batch renormalisation with statistics pooled over the workers.

        r = clip(sigma_B / sigma, 1 / r_max, r_max)
        d = clip((mean - running_mean) / sigma, -d_max, d_max)
        y = ((x - mean) / sigma_B * r + d) * weight + bias

    with sigma = sqrt(running_var + eps) before this batch and sigma_B = sqrt(var + eps) of the
    batch. Unclipped, training normalises as evaluation does, so small or biased batches no longer
    teach the network what it will not see. It adds to pooling rather than replacing it: pool where
    you can, renormalise where batches stay small.

    *Statistics*: as `SyncBatchNorm`, except that `running_average="std"` averages sigma_B itself,
    from the biased variance, and `running_var` holds max(sigma^2 - eps, 0).

    *Collectives*: as `SyncBatchNorm`. *Gradients*: r and d are constants.

    The schedule's clock is `num_batches_tracked`, so a resumed run continues its ramps. State dicts
    are those of `torch.nn.BatchNorm1d/2d/3d`; a layer that loads one of a trained batch norm starts
    with that one's clock.

    Args:
        num_features, eps, affine, process_group, device, dtype, bias, sync: as for `SyncBatchNorm`.
        momentum: weight of the new value in the running statistics; the paper's 0.01.
        track_running_stats: must be True; r and d refer to the running statistics.
        schedule: from the clock, an integer tensor (), to tensors (r_max, d_max); equal on all
            workers.
        running_average: "std", as in the paper, or "var", the unbiased variance.

    Raises:
        InputError: an argument breaks its rule, or, before any exchange, the schedule returns NaN,
            r_max < 1 or d_max < 0 (looked at on CUDA in debug mode only).

    Example:
        >>> layer = SyncBatchRenorm(3, schedule=RenormSchedule.switch(100, r_max=3.0, d_max=5.0))
        >>> layer(torch.randn(8, 3, 4, 4)).shape
        torch.Size([8, 3, 4, 4])

    References:
        Ioffe, Batch Renormalization, arXiv:1702.03275, algorithm 1 and section 4.1.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: groups.Spec = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        schedule: Schedule = RenormSchedule(),  # noqa: B008 frozen
        running_average: str = "std",
        sync: str | Lagged = "batch",
    ) -> None:
        if not track_running_stats:
            raise InputError(
                "`track_running_stats` must be True, got False. Renormalisation corrects towards "
                "running statistics; "
                "without them use SyncBatchNorm."
            )
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            process_group,
            device,
            dtype,
            bias=bias,
            sync=sync,
            schedule=schedule,
            running_average=running_average,
        )

    def set_up(
        self,
        process_group: groups.Spec,
        device: torch.device | str | None = None,
        *,
        sync: str | Lagged = "batch",
        schedule: Schedule = RenormSchedule(),  # noqa: B008 frozen
        running_average: str = "std",
    ) -> None:
        checks.check_running_average(running_average)
        super().set_up(process_group, device, sync=sync)
        if not callable(schedule) or isinstance(schedule, type):
            raise InputError(
                f"`schedule` must be a function from the step to (r_max, d_max), got {schedule!r}. "
                "RenormSchedule() is the paper's."
            )
        self.schedule = schedule
        self.running_average = running_average

    @property
    def averages_std(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.running_average == "std"

    def arguments(self) -> str:
        # A function's repr holds an address, which is another one on each worker.
        default = type(self.schedule).__qualname__
        schedule = (
            repr(self.schedule)
            if isinstance(self.schedule, RenormSchedule)
            else getattr(self.schedule, "__qualname__", default)
        )
        ours = f"schedule={schedule}, running_average={self.running_average!r}"
        return f"{super().arguments()}, {ours}"

    def bounds(self) -> tuple[Tensor, Tensor]:
        """(r_max, d_max) of the next training step, float64, shape ().

        Raises:
            InputError: they are out of range.
        """
        if self.num_batches_tracked is None:
            raise self._without("num_batches_tracked")
        pair = self.schedule(self.num_batches_tracked)
        try:
            r_max, d_max = pair
        except (TypeError, ValueError) as error:
            raise InputError(
                f"`schedule` must return (r_max, d_max), got {pair!r}. Correct the schedule."
            ) from error
        return checks.check_bounds(r_max, d_max, self.num_batches_tracked.device)

    def new_statistic(self, local: LocalSums) -> Statistic:
        reference = self._reference(local)
        statistic = super().new_statistic(local)
        return ops.renormalized(statistic, local, self.eps, reference)

    def _reference(self, local: LocalSums) -> kernels.Reference:
        """The reference of r and d. Looked at before any exchange."""
        if local.is_repeated and self.seen is not None and self.seen.correction is not None:
            # Of a forward that was not kept: the last one's.
            *_, mean, var, r_max, d_max = self.seen.correction
            return kernels.Reference(mean, var, (r_max, d_max))
        self.statistics.settle()
        own = self._buffers  # past `CurrentBuffers`, which would settle at each look
        mean, var = dict.get(own, "running_mean"), dict.get(own, "running_var")
        step = dict.get(own, "num_batches_tracked")
        if mean is None or var is None:
            raise self._without("running_mean" if mean is None else "running_var")
        if local.kernels is None:
            return kernels.Reference(mean.clone(), var.clone(), self.bounds())
        # The kernel that normalises reads them before they move, and keeps what it has read. It
        # knows our schedule; a class that inherits from it, or from the layer, may say otherwise.
        schedule, ours = self.schedule, RenormSchedule
        is_ours = type(schedule) is ours and type(self).bounds is SyncBatchRenorm.bounds
        if step is not None and is_ours and isinstance(schedule, ours):
            return kernels.Reference(mean, var, kernels.Scheduled(step, schedule))
        return kernels.Reference(mean, var, self.bounds())

    def _without(self, name: str) -> InputError:
        return InputError(
            f"`{name}` must be there in training, got None in '{self.label}'. Renormalisation "
            "corrects towards the running statistics. To normalise by the batch alone, "
            "convert(model, SyncBatchNorm) first."
        )
