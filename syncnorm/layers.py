"""Normalisation layers whose statistics are those of the whole batch, however it is sharded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm import functional, ops
from syncnorm.comm import groups
from syncnorm.maths.moments import Moments, update_running_


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation with statistics pooled over the workers.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    *Statistics*: per channel over every element of every worker in `process_group`, weighted by `mask`; the
    biased variance normalises, the unbiased one (by the global count n) goes into `running_var`. n = 1 gives
    y = bias and leaves `running_var`; n = 0 changes no buffer. In evaluation the running statistics are used,
    exactly as `torch.nn.BatchNorm2d` uses them, without communication.

    *Collectives*: in training, with `sync="batch"` and more than one worker, one all-reduce of 2C+1 float64
    numbers forward and one of 2C backward. Every worker must take part, also one whose batch is empty. The
    first training forward makes a process group for statistics (`prepare_ddp` makes it earlier).

    *Gradients*: of weight and bias local sums, which DistributedDataParallel averages.

    State dicts are those of `torch.nn.BatchNorm1d/2d/3d`. Input of 2 or more dimensions, on CPU and CUDA.

    Args:
        num_features: C, at least 1.
        eps: added to the variance, > 0.
        momentum: weight of the new value in the running statistics, in [0, 1]; None: cumulative average.
        affine: whether to learn weight and bias.
        track_running_stats: whether to keep running statistics; without them evaluation uses the local batch.
        process_group: the workers to pool over; None: all of them.
        device, dtype: of parameters and buffers.
        sync: "batch" pools the statistics of each batch; "none" keeps everything local.

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
        process_group: groups.Group | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        sync: str = "batch",
    ) -> None:
        functional.check_hyperparameters(num_features, eps, momentum, sync)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.process_group = process_group
        self.sync = sync
        self._has_warned = False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Normalise x, shape (N, C, *S); mask: weights >= 0 broadcastable to (N, 1, *S), for training only."""
        functional.check_input(x, self.num_features)
        weights = functional.expand_mask(mask, x)
        if not self.training:
            return functional.evaluate(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        group = groups.statistics_group(self.process_group) if self.sync == "batch" else None
        batch = ops.pooled_moments(x, weights, group)
        functional.check_count(batch, group, self._warn_once)
        y = ops.normalize(x, self.weight, self.bias, batch, self.eps, weights, group)
        self._update_running(batch)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sync={self.sync!r}"

    @torch.no_grad()
    def _update_running(self, batch: Moments) -> None:
        if self.running_mean is not None and self.running_var is not None:
            update_running_(self.running_mean, self.running_var, self.num_batches_tracked, batch, self.momentum)

    def _warn_once(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            functional.warn_single_value()
