"""The path of a training forward, in operations that all layers and functions share.

    local = local_sums(x, mask, weight, bias)                     one pass over x
    statistic = pooled_statistic(local, group)                    one exchange of 2C+1 numbers
    y, statistic = normalize_batch(x, weight, bias, statistic, eps, local)
                                                                  backward: one exchange of 2C
    update_running_(..., statistic.moments, ...)                  (C,)-sized, no exchange

These are numbers of payload: with the identity of its layer each message has 2C+2 on the wire.

The idea: to autograd the moments are part of the normalisation, which differentiates through them.
So a statistic may come from anywhere (see `syncnorm.statistics`), and a layer may fold any constant
factors into `weight` and `bias` (batch renormalisation does: `renormalized`) and needs no backward
of its own. Kernels that finish a statistic themselves are in `LocalSums.kernels`, and
`normalize_batch` goes their way.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from syncnorm import checks, compiled, faults, tracing, undocumented
from syncnorm.autograd import ANCHOR, GradientMeans, Normalize
from syncnorm.comm import debug, exchange, groups
from syncnorm.device import is_host
from syncnorm.fused import apply_fused
from syncnorm.maths import formula, kernels, renorm
from syncnorm.maths.moments import (
    Moments,
    Raw,
    Traced,
    Unread,
    average_factor,
    reciprocal,
    update_running_mean_,
    update_running_var_,
)
from syncnorm.shards import Shard, is_uneven


class LocalSums(NamedTuple):
    """One worker's share of a statistic."""

    sums: Tensor
    """[sum wx, sum wx^2, sum w], shape (2C+1,), float64."""
    mask: Tensor | None
    """The weights, with 0 in place of what is no weight (but where kernels see to that)."""
    has_fault: Tensor | None
    """True if something was no weight, shape (); None without a mask.

    None also from kernels of a GPU outside of debug mode: there the count is NaN.
    """
    given: Tensor | None
    """The mask as it was given, for the error."""
    is_repeated: bool = False
    """True if activation checkpointing repeats a forward by this one. Code that is being compiled
    does not know: see `compiled.unless_repeated`."""
    is_compiled: bool = False
    """True in code that is being compiled: no number is there to be looked at."""
    tracer: str | None = None
    """The name of what follows operators rather than numbers; see `syncnorm.tracing`."""
    kernels: ModuleType | None = None
    """The kernels that finish the statistic themselves; None where it is finished here."""
    has_several: bool = False
    """True if more than one value counts here, which is known without a look at the count."""


def local_sums(
    x: Tensor, mask: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None
) -> LocalSums:
    """The raw sums of this worker's batch. No exchange, no gradient.

    Args:
        x: shape (N, C, *S).
        mask: weights (N, 1, *S) or None.
        weight, bias: what x will be normalised with, (C,) or None.

    Raises:
        InputError: they are on several devices, x is a DTensor, or weight or bias has not C
            elements.
    """
    if type(x) is not Tensor:
        checks.check_local(x)
    tracer = tracing.tracer_of(x)
    is_compiled = torch.compiler.is_compiling()
    # As `is_recomputing()`, but for a call in every forward.
    is_repeated = not is_compiled and undocumented.backward_pass() != -1
    # A meta tensor stands for one of a device, whose launches can so be looked at without it.
    is_plain = tracer is None or (tracer == tracing.FAKE and x.is_meta)
    fused = kernels.fused_for(x, mask, weight, bias) if is_plain else None
    if fused is not kernels.native:  # whose tensors are all in memory
        checks.check_devices(x, mask=mask, weight=weight, bias=bias)
    # Kernels would read beyond the end.
    channels = x.shape[1]
    if weight is not None and weight.shape != (channels,):
        raise checks.wrong_shape("weight", weight, channels, x)
    if bias is not None and bias.shape != (channels,):
        raise checks.wrong_shape("bias", bias, channels, x)
    if fused is None:
        with torch.no_grad():
            if tracer is not None:
                return _traced_sums(x, mask, tracer, is_repeated)
            return _unfused_sums(x, mask, is_compiled, is_repeated)
    sums, clean, has_fault = fused.moments(x, mask), mask, None
    if mask is not None and (is_host(x) or debug.is_on):
        has_fault = sums[-1].isnan()
        if is_host(x) and has_fault:
            clean, _ = _cleaned(mask)
            sums = fused.moments(x, clean)
    return LocalSums(
        sums,
        clean,
        has_fault,
        mask,
        is_repeated,
        tracer=tracer,
        kernels=fused,
        has_several=mask is None and x.numel() > channels,
    )


def _traced_sums(x: Tensor, mask: Tensor | None, tracer: str, is_repeated: bool) -> LocalSums:
    """The sums in front of a tracer. A fault stays in the weights: there is nobody to raise it."""
    clean = None if mask is None else torch.where(kernels.is_weight(mask), mask, torch.nan)
    sums = formula.raw_sums(x.detach(), clean)
    return LocalSums(sums, clean, None, mask, is_repeated, tracer=tracer)


def _unfused_sums(
    x: Tensor, mask: Tensor | None, is_compiled: bool, is_repeated: bool
) -> LocalSums:
    """The sums where the statistic is finished here, as in code that is being compiled."""
    clean = has_fault = None
    if mask is not None:
        clean, is_valid = _cleaned(mask)
        has_fault = ~is_valid.all()
    sums = kernels.local_moments(x.detach(), clean)
    return LocalSums(sums, clean, has_fault, mask, is_repeated, is_compiled)


def _cleaned(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mask with 0 in place of what is no weight, and where it is one."""
    is_valid = kernels.is_weight(mask)
    return torch.where(is_valid, mask, 0.0), is_valid


def message_of(local: LocalSums) -> Tensor:
    """The sums as they travel: with a count of NaN for a fault, of which one worker alone knows."""
    if local.has_fault is None:
        return local.sums
    count = torch.where(local.has_fault, torch.nan, local.sums[-1:])
    return torch.cat([local.sums[:-1], count])


class PooledMeans:
    """The exact means over all workers of `group`.

    *Collectives*: one all-reduce of 2C numbers, one of 5C where the gradient is differentiated.

    Args:
        moments: of the batch of all of them.
        group: the workers; None: this one.
        name: the layer, for errors.
        shard: one whose unevenness is to be noticed in the backward pass; None: none.
    """

    def __init__(
        self,
        moments: Moments,
        group: groups.Group | None,
        name: str = "",
        shard: Shard | None = None,
    ) -> None:
        self._moments = moments
        self.group = group
        self.name = name
        self.shard = shard

    @property
    def is_local(self) -> bool:
        return self.group is None

    def totals(self, local: Tensor) -> tuple[Tensor, Tensor | None]:
        total = exchange.sum_(local, self.group, "gradients", self.name)
        if self.shard is not None:
            self.shard.on_backward(self._moments.n, groups.ranks(self.group), self.name)
        return total, self._moments.count

    def double_backward_means(self, local: Tensor) -> Tensor:
        total = exchange.sum_(local, self.group, "second", self.name)
        return total * reciprocal(self._moments.n)

    def for_inner_gradient(self) -> PooledMeans:
        return self.for_repetition()

    def for_repetition(self) -> PooledMeans:
        # Without the shard: the loss that is to be scaled is another one.
        return PooledMeans(self._moments, self.group, self.name)


class Statistic(NamedTuple):
    """The moments that normalise a batch, and how its gradient is pooled."""

    moments: Moments
    """The batch's moments; under "lagged", where a layer does not wait, averages of earlier steps."""
    gradient_means: GradientMeans
    is_pooled: bool
    """True if other workers take part, in the backward pass too."""
    correction: renorm.Correction | None = None
    """The r and d that renormalisation folds into weight and bias."""
    reference: kernels.Reference | None = None
    """The reference of r and d where the kernel that normalises is to compute them."""

    def for_repetition(self) -> Statistic:
        """The same for a repetition of the call, whose gradient means are counted in no step."""
        return self._replace(gradient_means=self.gradient_means.for_repetition())


def pooled_statistic(
    local: LocalSums, group: groups.Group | None, name: str, *, is_averaged: bool = False
) -> Statistic:
    """The moments of the batch over all workers of `group`.

    With `is_averaged`, the gradients are about to be averaged over the workers, so that uneven
    shards are noticed.

    *Collectives*: one all-reduce of the message, 2C+1 numbers and its identity; every worker must
    call, with samples or without. A second message only to say who was at fault.

    Raises:
        FaultError: on every worker, if the mask of one is negative or not finite; in debug mode
            also if the input of one is not finite. On CUDA both are looked at in debug mode only,
            since looking costs a host synchronisation; otherwise the output is NaN and the buffers
            keep still.
    """
    message = local.sums if local.has_fault is None else message_of(local)
    sums = exchange.sum_(message, group, "moments", name)
    if local.is_compiled:
        batch = Unread.of_sums(sums)
        return Statistic(batch, PooledMeans(batch, group, name), group is not None)
    batch, shard = Raw(sums, local.has_several), None
    n = batch.n
    # Where a look at the count would wait, it is looked at in debug mode only.
    if debug.is_on or (not isinstance(n, Tensor) and math.isnan(n)):
        faults.check(sums, local.sums, local.given, group, name)
    # A forward that is repeated comes after the loss was scaled.
    if is_averaged and group is not None and not local.is_repeated and not isinstance(n, Tensor):
        count = local.sums[-1]
        shard = Shard(count) if is_uneven(count, n, group.size()) else None
    return Statistic(batch, PooledMeans(batch, group, name, shard), group is not None)


def statistic_if_alone(
    local: LocalSums, process_group: groups.Spec | groups.GroupHandle, name: str
) -> Statistic:
    """The moments of the batch in front of a tracer, which would not see an exchange.

    Raises:
        InputError: there are others in `process_group` to exchange with. (Fake tensors have nothing
            to exchange.)
    """
    if local.tracer == tracing.FAKE or _is_alone(process_group):
        return local_statistic(local, name)
    raise tracing.refuse(local.tracer or "", name)


def _is_alone(process_group: groups.Spec | groups.GroupHandle) -> bool:
    """True if there is nobody to pool with. No group is made, since one worker may ask alone."""
    if not groups.is_shared():
        return True
    world_size = len(groups.ranks(groups.existing_group(None)))
    return groups.least_size(groups.to_handle(process_group), world_size) == 1


def local_statistic(local: LocalSums, name: str) -> Statistic:
    """The moments of this worker's batch. *Collectives*: none."""
    if local.tracer is None:
        return pooled_statistic(local, None, name)
    if local.kernels is not None:
        batch = Raw(local.sums, local.has_several)
    else:
        batch = Traced.of_sums(local.sums)
    return Statistic(batch, PooledMeans(batch, None, name), is_pooled=False)


def renormalized(
    statistic: Statistic, local: LocalSums, eps: float, reference: kernels.Reference
) -> Statistic:
    """The statistic of batch renormalisation: with r and d towards the running statistics.

    Kernels that finish a statistic themselves are given these instead.
    """
    if local.kernels is not None:
        return statistic._replace(reference=reference)
    mean, var, bounds = reference
    assert not isinstance(bounds, kernels.Scheduled)
    with torch.no_grad():
        r, d = renorm.correction(statistic.moments, mean, var, eps, *bounds)
        if local.is_compiled:
            r, d = compiled.constant(r), compiled.constant(d)
    return statistic._replace(correction=renorm.Correction(r, d, mean, var, *bounds))


def fold(
    weight: Tensor | None, bias: Tensor | None, statistic: Statistic
) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias as they are; weight * r and bias + weight * d where there is a correction.

    The latter are (C,), float64; differentiable in weight and bias.
    """
    if statistic.correction is None:
        return weight, bias
    r, d, *_ = statistic.correction
    weight = torch.ones_like(r) if weight is None else weight.to(r.dtype)
    bias = torch.zeros_like(d) if bias is None else bias.to(d.dtype)
    return weight * r, bias + weight * d


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistic: Statistic,
    eps: float,
    mask: Tensor | None,
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, the moments being functions of x.

    *Gradients*: with respect to x, through the moments as well; for weight and bias local sums.
    *Collectives*: those of `gradient_means` in the backward pass, whatever needs a gradient on this
    worker.

    Args:
        x: shape (N, C, *S).
        weight, bias: (C,) or None, of any floating type.
        statistic: the moments, float64.
        eps: added to the variance.
        mask: weights (N, 1, *S) or None.
    """
    if isinstance(statistic.moments, Traced) and tracing.tracer_of(x) != tracing.FAKE:
        return formula.normalize(x, weight, bias, mask, eps)
    moments, anchor = statistic.moments, _anchor(weight, bias, statistic)
    return Normalize.apply(
        x, weight, bias, anchor, moments.mean, moments.invstd(eps), mask, statistic.gradient_means
    )


def normalize_batch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistic: Statistic,
    eps: float,
    local: LocalSums,
) -> tuple[Tensor, Statistic]:
    """`normalize` the x of a training forward, r and d included: y, and the statistic with them.

    The running statistics are to follow that one. Kernels that made the sums go through all that is
    (C,)-sized themselves, so that a call is a few launches.
    """
    chosen = local.kernels
    if chosen is None:
        y = normalize(x, *fold(weight, bias, statistic), statistic, eps, local.mask)
        if local.is_compiled:
            statistic = statistic._replace(moments=compiled.unless_repeated(statistic.moments))
        return y, statistic
    moments, reference = statistic.moments, statistic.reference
    if statistic.correction is not None:  # of a call that is repeated
        *_, running_mean, running_var, r_max, d_max = statistic.correction
        reference = kernels.Reference(running_mean, running_var, (r_max, d_max))
    if reference is not None:
        checks.check_devices(
            x, running_mean=reference.running_mean, running_var=reference.running_var
        )
        if not reference.running_mean.shape == reference.running_var.shape == (x.shape[1],):
            raise checks.wrong_running(reference.running_mean, reference.running_var, x.shape[1], x)
    anchor, means = _anchor(weight, bias, statistic), statistic.gradient_means
    y = apply_fused(x, weight, bias, anchor, local.mask, chosen, moments, eps, reference, means)
    if reference is not None:
        _, _, _, r, d, running_mean, running_var, r_max, d_max = moments.rows.unbind()
        statistic = statistic._replace(
            correction=renorm.Correction(r, d, running_mean, running_var, r_max[0], d_max[0])
        )
    return y, statistic


def _anchor(weight: Tensor | None, bias: Tensor | None, statistic: Statistic) -> Tensor | None:
    """What needs a gradient if nothing else does.

    Whether x needs one may differ between workers; the exchange in backward must not.
    """
    has_grad = (weight is not None and weight.requires_grad) or (
        bias is not None and bias.requires_grad
    )
    return ANCHOR if statistic.is_pooled and not has_grad and torch.is_grad_enabled() else None


def update_running_(
    running_mean: Tensor,
    running_var: Tensor,
    counter: Tensor | None,
    batch: Moments,
    momentum: float | None,
    eps: float,
    *,
    is_std: bool,
) -> None:
    """Count the batch and move the running statistics towards its own, in place.

    With `is_std` the standard deviation follows, by the biased variance, else the unbiased
    variance. See `syncnorm.maths.moments` for what a batch of one value or none changes. Without a
    momentum each batch weighs 1 / counter; without a counter, either, nothing moves, as in torch.
    """
    if momentum is None and counter is None:
        return
    chosen = kernels.fused_for_running(running_mean, running_var, batch.count)
    if chosen is not kernels.native:
        checks.check_devices(
            batch.count,
            running_mean=running_mean,
            running_var=running_var,
            num_batches_tracked=counter,
        )
    if chosen is not None and not isinstance(batch, Unread):
        channels = batch.packed[0].numel() // 2
        if not running_mean.shape == running_var.shape == (channels,):
            raise checks.wrong_running(running_mean, running_var, channels)
        chosen.update_running_(running_mean, running_var, counter, batch, momentum, eps, is_std)
        return
    with torch.no_grad():
        factor = average_factor(counter, batch, momentum)
        update_running_mean_(running_mean, batch, factor)
        if is_std:
            renorm.update_running_std_(running_var, batch, eps, factor)
        else:
            update_running_var_(running_var, batch, factor)
