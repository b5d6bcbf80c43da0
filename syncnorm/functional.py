"""Normalisation over the shards of a batch, as functions."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from syncnorm import checks, inference, ops, tracing
from syncnorm.comm import groups
from syncnorm.errors import InputError
from syncnorm.maths import kernels
from syncnorm.maths.moments import Moments
from syncnorm.undocumented import unseen_by_selective_checkpoint

__all__ = ["sync_batch_norm", "sync_batch_renorm"]


@tracing.function_call
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
    process_group: groups.Spec = None,
) -> Tensor:
    """Batch normalisation over the shards of all workers, as if they were one batch.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    *Statistics*: in training, mean and biased variance per channel over every element of every
    worker, each with its weight in `mask`. The running variance takes the unbiased one, by the
    global count. Otherwise the running statistics, exactly as `F.batch_norm`; without any, those of
    the local batch.

    *Collectives*: in training over more than one worker one all-reduce of 2C+2 float64 numbers, and
    one of as many in the backward pass. Every worker must call, also one without samples. None in
    evaluation.

    *Gradients*: of x through the pooled statistics; of weight and bias local sums
    (DistributedDataParallel averages them; scale the loss of uneven shards by `scale_loss`). The
    mask is constant.

    Args:
        x: shape (N, C, *S), floating; N may be 0 and may differ between workers.
        running_mean, running_var: shape (C,), updated in place in training; None: not tracked.
        weight, bias: shape (C,) or None.
        training: whether to normalise by the batch.
        momentum: in [0, 1]; None: cumulative average, which needs `num_batches_tracked`.
        eps: > 0, added to the variance.
        num_batches_tracked: integer counter, shape (), incremented in training.
        mask: weights >= 0, broadcastable to (N, 1, *S); bool or real. None: all ones.
        process_group: the workers to pool over, see `syncnorm.groups`; None: all, or nobody if
            torch.distributed is not initialised.

    Returns:
        y with the shape, type and memory layout of x. Where nothing counts on any worker (n = 0), y
        = bias.

    Raises:
        InputError: before any exchange, if an argument breaks its rule.
        FaultError: on every worker alike, if the weights of one are negative or not finite.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> sync_batch_norm(x, eps=1e-12).tolist()
        [[-1.0], [1.0]]

    References:
        Ioffe and Szegedy, Batch Normalization, arXiv:1502.03167, algorithm 1. Deviations: the
        pooled count makes the running variance unbiased; a statistic of one value leaves it alone.
    """
    _check_arguments(x, running_mean, running_var, weight, bias, num_batches_tracked, momentum, eps)
    mask = None if mask is None else checks.expand_mask(mask, x)
    if not training:
        return inference.evaluate(x, running_mean, running_var, weight, bias, eps)

    def update(batch: Moments) -> None:
        if running_mean is not None and running_var is not None:
            ops.update_running_(
                running_mean, running_var, num_batches_tracked, batch, momentum, eps, is_std=False
            )

    return _train(x, mask, weight, bias, eps, process_group, "sync_batch_norm", None, update)


@tracing.function_call
def sync_batch_renorm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    r_max: float | Tensor,
    d_max: float | Tensor,
    training: bool = True,
    momentum: float | None = 0.01,
    eps: float = 1e-5,
    running_average: str = "std",
    num_batches_tracked: Tensor | None = None,
    mask: Tensor | None = None,
    process_group: groups.Spec = None,
) -> Tensor:
    """Batch renormalisation over the shards of all workers.

    It is batch normalisation, corrected towards the running statistics:

        r = clip(sigma_B / sigma, 1 / r_max, r_max)
        d = clip((mean - running_mean) / sigma, -d_max, d_max)
        y = ((x - mean) / sigma_B * r + d) * weight + bias        sigma = sqrt(running_var + eps)

    with mean and sigma_B = sqrt(var + eps) of the batch over all workers, and the running
    statistics as they were before this batch. Where nothing is clipped, y is what evaluation gives.

    *Statistics, Collectives*: those of `sync_batch_norm`: no further pass and no further message.
    *Gradients*: r and d are constants; otherwise as `sync_batch_norm`. Under activation
    checkpointing use the layer, which remembers what the first forward saw; this function would see
    the running statistics it moved.

    Args:
        x, weight, bias, training, eps, num_batches_tracked, mask, process_group: as for
            `sync_batch_norm`.
        running_mean, running_var: shape (C,), updated in place in training. Required: r and d refer
            to them.
        r_max: >= 1, a number or a tensor of shape ().
        d_max: >= 0, a number or a tensor of shape ().
        momentum: weight of the new value; None: cumulative average.
        running_average: "std" averages sigma, as the paper does, and stores sigma^2 - eps; "var"
            averages the unbiased variance, as batch normalisation does.

    Returns:
        y with the shape, type and memory layout of x.

    Raises:
        InputError, FaultError: as `sync_batch_norm`; also for bounds out of range.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> mean, var = torch.zeros(1), torch.ones(1)
        >>> sync_batch_renorm(x, mean, var, r_max=3.0, d_max=5.0, eps=1e-12).tolist()
        [[1.0], [3.0]]

    References:
        Ioffe, Batch Renormalization, arXiv:1702.03275, algorithm 1.
    """
    if running_mean is None or running_var is None:
        raise InputError(
            "`running_mean` and `running_var` must be given, got None. Renormalisation corrects "
            "towards them."
        )
    _check_arguments(x, running_mean, running_var, weight, bias, num_batches_tracked, momentum, eps)
    checks.check_running_average(running_average)
    bounds = checks.check_bounds(r_max, d_max, x.device)
    mask = None if mask is None else checks.expand_mask(mask, x)
    if not training:
        return inference.evaluate(x, running_mean, running_var, weight, bias, eps)

    def update(batch: Moments) -> None:
        ops.update_running_(
            running_mean,
            running_var,
            num_batches_tracked,
            batch,
            momentum,
            eps,
            is_std=running_average == "std",
        )

    reference = kernels.Reference(running_mean, running_var, bounds)
    return _train(x, mask, weight, bias, eps, process_group, "sync_batch_renorm", reference, update)


@unseen_by_selective_checkpoint
def _train(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    process_group: groups.Spec,
    name: str,
    reference: kernels.Reference | None,
    update: Callable[[Moments], None],
) -> Tensor:
    """The training forward of a function."""
    local = ops.local_sums(x, mask, weight, bias)
    if local.tracer is not None:
        statistic = ops.statistic_if_alone(local, process_group, name)
    else:
        statistic = ops.pooled_statistic(local, groups.statistics_group(process_group), name)
        checks.check_count(statistic, checks.warn_single_value)
    if reference is not None:
        statistic = ops.renormalized(statistic, local, eps, reference)
    y, statistic = ops.normalize_batch(x, weight, bias, statistic, eps, local)
    if not local.is_repeated:
        update(statistic.moments)
    return y


def _check_arguments(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> None:
    checks.check_input(x, None)
    checks.check_hyperparameters(x.shape[1], eps, momentum)
    vectors = {
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
    }
    for name, t in vectors.items():
        if t is not None and t.shape != (x.shape[1],):
            raise checks.wrong_shape(name, t, x.shape[1], x)
    checks.check_pair(running_mean, running_var)
    if momentum is None and running_mean is not None and num_batches_tracked is None:
        raise InputError(
            "`num_batches_tracked` must be a counter where `momentum` is None (cumulative "
            "average), got None. "
            "Pass a 0-dim integer tensor."
        )
