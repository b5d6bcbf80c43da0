"""Normalisation over the shards of a batch, as functions.

Arguments are checked here, for functions and layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from syncnorm import compiled, observed, ops
from syncnorm.comm import debug, groups
from syncnorm.device import is_host
from syncnorm.errors import FaultError, InputError, SingleValueWarning
from syncnorm.maths import kernels, renorm
from syncnorm.maths.moments import Moments, Unread
from syncnorm.maths.precision import sum_dtype
from syncnorm.ops import LocalSums, Statistic

__all__ = ["sync_batch_norm", "sync_batch_renorm"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@observed.function_call
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

    *Collectives*: in training over more than one worker one all-reduce of 2C+1 float64 numbers, and
    one of 2C in the backward pass. Every worker must call, also one without samples. None in
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
    mask = None if mask is None else expand_mask(mask, x)
    if not training:
        return evaluate(x, running_mean, running_var, weight, bias, eps)

    def update(batch: Moments) -> None:
        if running_mean is not None and running_var is not None:
            ops.update_running_(
                running_mean, running_var, num_batches_tracked, batch, momentum, eps, is_std=False
            )

    return _train(x, mask, weight, bias, eps, process_group, "sync_batch_norm", None, update)


@observed.function_call
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
    check_running_average(running_average)
    bounds = check_bounds(r_max, d_max, x.device)
    mask = None if mask is None else expand_mask(mask, x)
    if not training:
        return evaluate(x, running_mean, running_var, weight, bias, eps)

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

    before = kernels.Reference(running_mean, running_var, bounds)
    return _train(x, mask, weight, bias, eps, process_group, "sync_batch_renorm", before, update)


def _train(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    process_group: groups.Spec,
    name: str,
    before: kernels.Reference | None,
    update: Callable[[Moments], None],
) -> Tensor:
    """The training forward of a function."""
    local = ops.local_sums(x, mask, weight, bias)
    if local.observer is not None:
        statistic = ops.observed_statistic(local, process_group, name)
    else:
        statistic = ops.pooled_statistic(local, groups.statistics_group(process_group), name)
    check_count(statistic, warn_single_value)
    if before is not None and local.kernels is not None:
        statistic = statistic._replace(reference=before)
    elif before is not None:
        statistic = correct(statistic, local, eps, before)
    y, statistic = ops.normalize_batch(x, weight, bias, statistic, eps, local)
    if not local.is_repeated:
        update(statistic.batch)
    return y


@torch.no_grad()
def correct(
    statistic: Statistic, local: LocalSums, eps: float, before: kernels.Reference
) -> Statistic:
    """The statistic with the correction of renormalisation against the running statistics.

    For a call whose kernels do not see to that.
    """
    mean, var, bounds = before
    assert not isinstance(bounds, kernels.Scheduled)
    r, d = renorm.correction(statistic.batch, mean, var, eps, *bounds)
    if local.is_repeated is None:
        r, d = compiled.constant(r), compiled.constant(d)
    return statistic._replace(correction=renorm.Correction(r, d, mean, var, *bounds))


def evaluate(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Normalise by the running statistics, or by the local batch without them. No communication."""
    if running_mean is None or running_var is None:
        check_pair(running_mean, running_var)
        statistic = ops.local_statistic(ops.local_sums(x, None), "evaluation")
        return ops.normalize(x, weight, bias, statistic, eps, None)
    given = (running_mean, running_var, weight, bias)
    if any(t is not None and t.dtype != x.dtype for t in given):
        # F.batch_norm takes them all in the type of x, or all in float32 with a half x.
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        running_mean, running_var, weight, bias = (None if t is None else t.to(wide) for t in given)
    return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)


def one_input(x: Tensor | None, input: Tensor | None) -> Tensor:
    """The input of a layer, given by our name or by torch's."""
    if x is not None and input is not None:
        raise InputError(
            "`x` must be given once, got `input` too. These are two names of one argument."
        )
    given = input if x is None else x
    if given is None:
        raise InputError(
            "`x` must be given, got None. Call the layer with a tensor of shape (N, C, *S)."
        )
    return given


def check_input(x: Tensor, num_features: int | None) -> None:
    """Raise InputError unless x is a floating (N, C, *S) tensor with C = num_features."""
    if not isinstance(x, Tensor):
        raise _no_tensor("x", x)
    if x.ndim < 2:
        raise InputError(
            f"`x` must have 2 or more dimensions (N, C, *S), got {x.ndim} (shape "
            f"{tuple(x.shape)}). "
            "Add a batch dimension with x.unsqueeze(0)."
        )
    if x.layout != torch.strided:
        raise InputError(
            f"`x` must be dense, got {x.layout} (shape {tuple(x.shape)}). Call x.to_dense(), or "
            "normalise its values, as rows (N, C), where zeros should not count."
        )
    if x.dtype not in _FLOATS:
        raise InputError(
            f"`x` must be float32, float64, bfloat16 or float16, got {x.dtype} (shape "
            f"{tuple(x.shape)}). "
            "Convert it with x.float()."
        )
    if num_features is not None and x.shape[1] != num_features:
        raise InputError(
            f"`x` must have num_features = {num_features} channels in dimension 1, got "
            f"{x.shape[1]} "
            f"(shape {tuple(x.shape)}). Move the channels to dimension 1, or build the layer for "
            f"{x.shape[1]}."
        )


def _no_tensor(name: str, value: object) -> InputError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return InputError(
        f"`{name}` must be a tensor, got a {kind}. torch.as_tensor makes one of an array."
    )


def check_hyperparameters(num_features: int, eps: float, momentum: float | None) -> None:
    """Raise InputError unless a layer can be built with these."""
    if num_features < 1:
        raise InputError(
            f"`num_features` must be at least 1, got {num_features}. Pass the number of channels."
        )
    if not eps > 0:
        raise InputError(f"`eps` must be > 0, got {eps}. The default is 1e-5.")
    if momentum is not None and not 0 <= momentum <= 1:
        raise InputError(
            f"`momentum` must be in [0, 1], or None for a cumulative average, got {momentum}. "
            "It is the weight of the new value."
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise InputError unless `value` is one of the choices, the first being the default."""
    if value not in choices:
        known = " or ".join(f'"{choice}"' for choice in choices)
        raise InputError(f'`{name}` must be {known}, got {value!r}. The default is "{choices[0]}".')


def check_running_average(value: str) -> None:
    """Raise InputError unless it is "std" or "var"."""
    check_choice("running_average", value, ("std", "var"))


def check_bounds(
    r_max: float | Tensor, d_max: float | Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The bounds as float64 tensors, or InputError if they are out of range (or NaN).

    They come from the schedule and the step, equal on all workers. On CUDA they are looked at in
    debug mode only, if they are tensors there.
    """
    for name, value, least in (("r_max", r_max, 1.0), ("d_max", d_max, 0.0)):
        if value.numel() != 1 if isinstance(value, Tensor) else not isinstance(value, Real):
            raise InputError(
                f"`{name}` must be a number or a tensor of one, got {value!r}. Correct the "
                "schedule."
            )
        if isinstance(value, Tensor) and (
            torch.compiler.is_compiling() or observed.observer(value) is not None
        ):
            continue
        is_free = not isinstance(value, Tensor) or is_host(value) or debug.is_on
        if is_free and not value >= least:
            raise InputError(
                f"`{name}` must be >= {least:g}, got {float(value):g}. Correct the schedule."
            )
    return _as_scalar(r_max, device), _as_scalar(d_max, device)


def _as_scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """A tensor of shape () in the type of sums, made without a copy from the host to a CUDA device."""
    if isinstance(value, Tensor):
        return value.to(device, sum_dtype(device))
    return torch.full((), value, dtype=sum_dtype(device), device=device)


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
    check_input(x, None)
    check_hyperparameters(x.shape[1], eps, momentum)
    vectors = {
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
    }
    for name, t in vectors.items():
        if t is not None and t.shape != (x.shape[1],):
            raise ops.wrong_shape(name, t, x.shape[1], x)
    check_pair(running_mean, running_var)
    if momentum is None and running_mean is not None and num_batches_tracked is None:
        raise InputError(
            "`num_batches_tracked` must be a counter where `momentum` is None (cumulative "
            "average), got None. "
            "Pass a 0-dim integer tensor."
        )


def check_pair(
    running_mean: Tensor | None, running_var: Tensor | None, name: str | None = None
) -> None:
    """Raise InputError unless both are there or neither; of a function's, or a layer's by name."""
    if (running_mean is None) != (running_var is None):
        where = "" if name is None else f" in {name!r}"
        raise InputError(
            f"`running_mean` and `running_var` must be given together, got one{where}. Pass both "
            "or neither."
        )


def expand_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The mask as floating weights, expanded to (N, 1, *S); InputError if it does not broadcast."""
    if not isinstance(mask, Tensor):
        raise _no_tensor("mask", mask)
    shape = (x.shape[0], 1, *x.shape[2:])
    if mask.is_complex():
        raise InputError(
            f"`mask` must be bool or real, got {mask.dtype} (shape {tuple(mask.shape)}). Take its "
            "abs()."
        )
    try:
        expanded = mask.detach().expand(shape)
    except RuntimeError:
        raise InputError(
            f"`mask` must broadcast to (N, 1, *S) = {shape}, got shape {tuple(mask.shape)}. "
            "A mask without a channel dimension needs mask.unsqueeze(1)."
        ) from None
    return expanded if expanded.is_floating_point() else expanded.to(torch.float32)


def check_count(statistic: Statistic, warn: Callable[[], None]) -> None:
    """Call `warn` if a statistic is over one value; in debug mode raise, if all workers do so.

    A pooled count is known to all. On CUDA it is looked at in debug mode only.
    """
    n = statistic.batch.n
    if isinstance(statistic.batch, Unread):
        return
    # A weight of 1 may also be that of several values.
    is_looked_at = not isinstance(n, Tensor) or debug.is_on
    if is_looked_at and n == 1 and not statistic.batch.m2.any():
        if debug.is_on and (statistic.is_pooled or not groups.is_shared()):
            raise FaultError(
                "`x` must give a statistic more than one value per channel, got a total weight of "
                "1 over all workers. "
                "Use larger batches or evaluation mode."
            )
        warn()


def warn_single_value() -> None:
    """Say that the batch says nothing about its scale."""
    warnings.warn(
        "a training statistic was taken over a single value per channel: its variance is 0, the "
        "output does not "
        "depend on the input, and the running variance was left as it is",
        SingleValueWarning,
        stacklevel=4,
    )
