"""Normalisation over the shards of a batch, as functions: the one place where arguments are checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from syncnorm import ops
from syncnorm.comm import groups, guard
from syncnorm.errors import FaultError, InputError, SingleValueWarning
from syncnorm.maths.moments import Moments, update_running_

__all__ = ["sync_batch_norm"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def sync_batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: Tensor | None = None,
    mask: Tensor | None = None,
    process_group: groups.Group | None = None,
    sync: str = "batch",
) -> Tensor:
    """Batch normalisation over the shards of all workers, as if they were one batch.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    *Statistics*: in training, mean and biased variance per channel over every element of every worker, each
    with its weight in `mask`. The running variance takes the unbiased one, by the global count. Otherwise the
    running statistics, exactly as `F.batch_norm`; without any, those of the local batch.

    *Collectives*: in training over more than one worker one all-reduce of 2C+1 float64 numbers, and one of 2C
    in the backward pass. Every worker must call, also one without samples. None in evaluation.

    *Gradients*: of x through the pooled statistics; of weight and bias local sums (DistributedDataParallel
    averages them; scale the loss of uneven shards by `scale_loss`). The mask is constant.

    Args:
        x: shape (N, C, *S), floating; N may be 0 and may differ between workers.
        running_mean, running_var: shape (C,), updated in place in training; None: not tracked.
        weight, bias: shape (C,) or None.
        training: whether to normalise by the batch.
        momentum: in [0, 1]; None: cumulative average, which needs `num_batches_tracked`.
        eps: > 0, added to the variance.
        num_batches_tracked: integer counter, shape (), incremented in training.
        mask: weights >= 0, broadcastable to (N, 1, *S); bool or real. None: all ones.
        process_group: the workers to pool over; None: all, or nobody if torch.distributed is not initialised.
        sync: "batch", or "none" for local statistics.

    Returns:
        y with the shape, type and memory layout of x. Where nothing counts on any worker (n = 0), y = bias.

    Raises:
        InputError: before any exchange, if an argument breaks its rule.
        FaultError: on every worker alike, if the weights of one are negative or not finite.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> sync_batch_norm(x, eps=1e-12).tolist()
        [[-1.0], [1.0]]

    References:
        Ioffe and Szegedy, Batch Normalization, arXiv:1502.03167, algorithm 1. Deviations: the pooled count
        makes the running variance unbiased; a statistic of one value leaves it alone.
    """
    check_input(x, None)
    check_hyperparameters(x.shape[1], eps, momentum, sync)
    _check_channels(x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    if (running_mean is None) != (running_var is None):
        raise InputError("`running_mean` and `running_var` must be given together, got one. Pass both or neither.")
    if momentum is None and running_mean is not None and num_batches_tracked is None:
        raise InputError(
            "`num_batches_tracked` must be a counter where `momentum` is None (cumulative average), got None. "
            "Pass a 0-dim integer tensor."
        )
    mask = expand_mask(mask, x)
    if not training:
        return evaluate(x, running_mean, running_var, weight, bias, eps)
    group = groups.statistics_group(process_group) if sync == "batch" else None
    batch = ops.pooled_moments(x, mask, group)
    check_count(batch, group, warn_single_value)
    y = ops.normalize(x, weight, bias, batch, eps, mask, group)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            update_running_(running_mean, running_var, num_batches_tracked, batch, momentum)
    return y


def evaluate(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Normalise by the running statistics, or by the local batch without them. No communication."""
    if running_mean is None:
        batch = ops.pooled_moments(x, None, None)
        return ops.normalize(x, weight, bias, batch, eps, None, None)
    return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)


def check_input(x: Tensor, num_features: int | None) -> None:
    """Raise InputError unless x is a floating (N, C, *S) tensor with C = num_features."""
    if x.ndim < 2:
        raise InputError(
            f"`x` must have 2 or more dimensions (N, C, *S), got {x.ndim} (shape {tuple(x.shape)}). "
            "Add a batch dimension with x.unsqueeze(0)."
        )
    if x.dtype not in _FLOATS:
        raise InputError(
            f"`x` must be float32, float64, bfloat16 or float16, got {x.dtype} (shape {tuple(x.shape)}). "
            "Convert it with x.float()."
        )
    if num_features is not None and x.shape[1] != num_features:
        raise InputError(
            f"`x` must have num_features = {num_features} channels in dimension 1, got {x.shape[1]} "
            f"(shape {tuple(x.shape)}). Move the channels to dimension 1, or build the layer for {x.shape[1]}."
        )


def check_hyperparameters(num_features: int, eps: float, momentum: float | None, sync: str) -> None:
    """Raise InputError unless a layer can be built with these."""
    if num_features < 1:
        raise InputError(f"`num_features` must be at least 1, got {num_features}. Pass the number of channels.")
    if not eps > 0:
        raise InputError(f"`eps` must be > 0, got {eps}. The default is 1e-5.")
    if momentum is not None and not 0 <= momentum <= 1:
        raise InputError(
            f"`momentum` must be in [0, 1], or None for a cumulative average, got {momentum}. "
            "It is the weight of the new value."
        )
    if sync not in ("batch", "none"):
        raise InputError(f'`sync` must be "batch" or "none", got {sync!r}. The default is "batch".')


def _check_channels(x: Tensor, **vectors: Tensor | None) -> None:
    for name, t in vectors.items():
        if t is not None and t.shape != (x.shape[1],):
            raise InputError(
                f"`{name}` must have shape ({x.shape[1]},), got {tuple(t.shape)} (x has shape {tuple(x.shape)}). "
                "It holds one value per channel."
            )


def expand_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask as floating weights of shape (N, 1, *S), or InputError if it does not broadcast to that."""
    if mask is None:
        return None
    shape = (x.shape[0], 1, *x.shape[2:])
    if mask.is_complex():
        raise InputError(f"`mask` must be bool or real, got {mask.dtype} (shape {tuple(mask.shape)}). Take its abs().")
    try:
        expanded = mask.detach().expand(shape)
    except RuntimeError:
        raise InputError(
            f"`mask` must broadcast to (N, 1, *S) = {shape}, got shape {tuple(mask.shape)}. "
            "A mask without a channel dimension needs mask.unsqueeze(1)."
        ) from None
    return expanded if expanded.is_floating_point() else expanded.to(torch.float32)


def check_count(batch: Moments, group: groups.Group | None, warn: Callable[[], None]) -> None:
    """Call `warn` if the statistic is over one value; in debug mode raise, on every worker.

    The count is pooled, so all workers decide alike. On CUDA it is looked at in debug mode only.
    """
    if (batch.count.device.type == "cpu" or guard.is_debug()) and batch.count == 1:
        if guard.is_debug():
            raise FaultError(
                "`x` must give a statistic more than one value per channel, got a total weight of 1 over "
                f"{len(groups.ranks(group))} worker(s). Use larger batches or evaluation mode."
            )
        warn()


def warn_single_value() -> None:
    """Say that the output is the bias."""
    warnings.warn(
        "a training statistic was taken over a single value per channel: the output is the bias, and the "
        "running variance was left as it is",
        SingleValueWarning,
        stacklevel=4,
    )
