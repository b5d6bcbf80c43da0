"""The three operations that every normalisation layer is made of.

    local = local_sums(x, mask)                                   one pass over x
    statistic = pooled_statistic(local, group)                    one exchange of 2C+1 numbers
    y = normalize(x, weight, bias, statistic, eps, local.mask)    backward: one exchange of 2C

`normalize` differentiates through the moments too: to autograd they are part of it, so a layer may
fold any constant factors into `weight` and `bias` (batch renormalisation does) and needs no
backward of its own.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from syncnorm import observed
from syncnorm.autograd import ANCHOR, GradientMeans, Normalize
from syncnorm.comm import debug, exchange, groups
from syncnorm.errors import FaultError, UnevenShardsWarning
from syncnorm.maths import formula, kernels
from syncnorm.maths.moments import Moments, Unread, of_sums, reciprocal

_MAX_DIMS = 8


class LocalSums(NamedTuple):
    """One worker's share of a statistic."""

    sums: Tensor
    """[sum wx, sum wx^2, sum w], shape (2C+1,), float64."""
    mask: Tensor | None
    """The weights, with 0 in place of what is no weight."""
    has_fault: Tensor | None
    """Whether something was no weight, shape (); None without a mask."""
    given: Tensor | None
    """The mask as it was given, for the error."""
    observer: str | None = None
    """What looks at operators rather than numbers, if anything does: see `syncnorm.observed`."""


def local_sums(x: Tensor, mask: Tensor | None) -> LocalSums:
    """The raw sums of this worker's batch; mask (N, 1, *S) or None. No exchange, no gradient."""
    who = observed.observer(x)
    with torch.no_grad():
        if who is not None:
            # A fault stays in the weights: there is nobody to raise it.
            clean = None if mask is None else torch.where(_is_valid(mask), mask, torch.nan)
            return LocalSums(formula.raw_sums(x.detach(), clean), clean, None, mask, who)
        if mask is None:
            return LocalSums(kernels.local_moments(x.detach(), None), None, None, None)
        valid = _is_valid(mask)
        clean = torch.where(valid, mask, 0.0)
        return LocalSums(kernels.local_moments(x.detach(), clean), clean, ~valid.all(), mask)


def _is_valid(mask: Tensor) -> Tensor:
    """Which weights are weights: finite and >= 0."""
    return (mask >= 0) & mask.isfinite()


def pooled_sums(local: LocalSums, group: groups.Group | None, name: str) -> Tensor:
    """The raw sums of all workers of `group`, shape (2C+1,), float64.

    *Collectives*: one all-reduce of 2C+1 numbers; every worker must call, with samples or without.
    A second message only to say who was at fault.

    Raises:
        FaultError: on every worker, if the mask of one is negative or not finite; in debug mode
            also if the input of one is not finite. On CUDA both are looked at in debug mode only,
            since looking costs a host synchronisation; otherwise the output is NaN and the buffers
            keep still.
    """
    with torch.no_grad():
        sums = local.sums
        if local.has_fault is not None:
            # A fault travels as a count of NaN: whether somebody has a mask is known to that worker
            # alone.
            sums = torch.cat([sums[:-1], torch.where(local.has_fault, torch.nan, sums[-1:])])
        sums = exchange.sum_(sums, group, "moments", name)
        if torch.compiler.is_compiling():
            return sums
        is_looked_at = sums.device.type == "cpu" or debug.is_debug()
        if is_looked_at and (sums[-1].isnan() or (debug.is_debug() and not sums.isfinite().all())):
            _raise_fault(local, group, name)
        return sums


def _raise_fault(local: LocalSums, group: groups.Group | None, name: str) -> None:
    """Find out together whose data is at fault, and raise the same error everywhere."""
    report = torch.zeros(3 + _MAX_DIMS, dtype=torch.float64)
    report[0] = not local.sums.isfinite().all()
    if local.given is not None:
        wrong = local.given[~_is_valid(local.given)]
        if wrong.numel():
            report[1], report[2] = 1.0, wrong[0]
            shape = local.given.shape[:_MAX_DIMS]
            report[3 : 3 + len(shape)] = torch.tensor(shape)
    reports = exchange.gather(report.to(local.sums.device), group, "fault", name).tolist()
    masks, inputs = [], []
    for rank, (is_input, is_mask, value, *shape) in zip(groups.ranks(group), reports, strict=True):
        if is_mask:
            masks.append(f"{value:g} (shape {tuple(int(s) for s in shape if s)}, rank {rank})")
        if is_input:
            inputs.append(rank)
    if masks:
        raise FaultError(
            f"`mask` must hold finite weights >= 0, got {', '.join(masks)} in {name}. "
            "Give weight 0 to elements that should not count. Nothing was updated."
        )
    raise FaultError(
        f"`x` must be finite (debug mode), got NaN or infinity on rank(s) {inputs} in {name}. "
        "Look at what comes before that layer, on those ranks. Nothing was updated."
    )


class PooledMeans:
    """The exact means over all workers of `group`.

    *Collectives*: one all-reduce of 2C numbers, one of 5C where the gradient is differentiated.

    Args:
        batch: the pooled moments.
        group: the workers; None: this one.
        name: the layer, for errors.
        shard: whose unevenness to notice in the backward pass; None: nobody's.
    """

    def __init__(
        self, batch: Moments, group: groups.Group | None, name: str = "", shard: Shard | None = None
    ) -> None:
        self.n = batch.n
        self.group = group
        self.name = name
        self.shard = shard

    @property
    def is_local(self) -> bool:
        return self.group is None

    def __call__(self, local: Tensor) -> Tensor:
        total = exchange.sum_(local, self.group, "gradients", self.name)
        if self.shard is not None:
            self.shard.check(self.n, groups.ranks(self.group), self.name)
        return total * reciprocal(self.n)

    def of_second(self, local: Tensor) -> Tensor:
        return exchange.sum_(local, self.group, "second", self.name) * reciprocal(self.n)


class Shard:
    """One worker's part of a batch, to notice losses that should have been scaled and were not.

    DistributedDataParallel weights the workers equally, however much of the batch each holds.
    """

    scaled_losses = 0
    """How many losses this process has scaled, by `scale_loss` or in its way."""
    has_warned = False
    """Whether this process has warned. Once is enough."""

    def __init__(self, count: Tensor) -> None:
        self._count = count
        self._scaled = Shard.scaled_losses

    @property
    def is_scaled(self) -> bool:
        """True if a loss was scaled since the forward."""
        return Shard.scaled_losses != self._scaled

    def check(self, n: float | Tensor, ranks: list[int], name: str) -> None:
        """Warn, once, if the shards are uneven and no loss was scaled. Called in the backward pass.

        Args:
            n: the pooled count; on CUDA a tensor, which is not looked at.
            ranks: the workers.
            name: the layer.
        """
        if not Shard.has_warned and not self.is_scaled and not isinstance(n, Tensor):
            self.compare(n, ranks, name)

    def compare(self, n: float, ranks: list[int], name: str) -> None:
        """Warn if this worker's count is not the mean one."""
        count = self._count.item()
        # Sums of fractional weights are rounded.
        if not n > 0 or math.isclose(count * len(ranks), n, rel_tol=1e-9):
            return
        Shard.has_warned = True
        warnings.warn(
            f"workers should hold equal shards, or scale their losses: rank {groups.rank()} had "
            f"{count:g} of {n:g} "
            f"values per channel in {name!r} where each of {len(ranks)} equal shards has "
            f"{n / len(ranks):g}, and "
            "scale_loss was not called before the backward pass. DistributedDataParallel weights "
            "the workers equally, "
            "so the gradient is not that of the whole batch. Add `loss = scale_loss(loss, "
            "len(x))`. A loss that is "
            "weighted in another way needs nothing: filter this UnevenShardsWarning.",
            UnevenShardsWarning,
            stacklevel=2,
        )


class LateShard(Shard):
    """A shard whose pooled count arrives after the backward pass, which notes whether a loss was
    scaled before it.
    """

    def __init__(self, count: Tensor, name: str) -> None:
        super().__init__(count)
        self.name = name
        self.is_due = False
        """Whether there was a backward pass of a loss that was not scaled."""

    def check(self, n: float | Tensor, ranks: list[int], name: str) -> None:
        """Note how the backward pass finds it; `n` is this worker's own count here."""
        self.is_due = self.is_due or not self.is_scaled


class Statistic(NamedTuple):
    """What a batch is normalised by."""

    batch: Moments
    gradient_means: GradientMeans
    is_pooled: bool
    """Whether other workers take part, in the backward pass too."""


def pooled_statistic(
    local: LocalSums, group: groups.Group | None, name: str, *, is_averaged: bool = False
) -> Statistic:
    """The moments of the batch over all workers of `group`. *Collectives*: as `pooled_sums`.

    With `is_averaged`, the gradients are about to be averaged over the workers, so that uneven
    shards are noticed.
    """
    batch = of_sums(pooled_sums(local, group, name))
    # A forward that is repeated comes after the loss was scaled.
    is_noticed = (
        is_averaged
        and group is not None
        and not torch.compiler.is_compiling()
        and not is_recomputing()
    )
    shard = Shard(local.sums[-1]) if is_noticed else None
    return Statistic(batch, PooledMeans(batch, group, name, shard), group is not None)


def statistic_over(
    local: LocalSums,
    process_group: groups.Spec | groups.GroupHandle,
    name: str,
    *,
    is_averaged: bool = False,
) -> Statistic:
    """The moments of the batch over all workers of `process_group`, as `pooled_statistic`.

    Raises:
        InputError: something looks at operators, which would not see the exchange. (Fake tensors
            have none to make.)
    """
    if local.observer is None:
        return pooled_statistic(
            local, groups.statistics_group(process_group), name, is_averaged=is_averaged
        )
    if local.observer != observed.FAKE and not _is_alone(process_group):
        raise observed.refuse(local.observer, name)
    return local_statistic(local, name)


def _is_alone(process_group: groups.Spec | groups.GroupHandle) -> bool:
    """Whether there is nobody to pool with. No group is made, since one worker may ask alone."""
    if not groups.is_shared():
        return True
    return (
        groups.least_size(
            groups.to_handle(process_group), len(groups.ranks(groups.existing_group(None)))
        )
        == 1
    )


def local_statistic(local: LocalSums, name: str) -> Statistic:
    """The moments of this worker's batch. *Collectives*: none."""
    if local.observer is None:
        return pooled_statistic(local, None, name)
    batch = of_sums(local.sums, Unread)
    return Statistic(batch, PooledMeans(batch, None, name), is_pooled=False)


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
    if isinstance(statistic.batch, Unread) and observed.observer(x) != observed.FAKE:
        return formula.normalize(x, weight, bias, mask, eps)
    anchor = None
    if statistic.is_pooled and torch.is_grad_enabled() and not _needs_grad(weight, bias):
        # Whether x needs a gradient may differ between workers; the exchange in backward must not.
        anchor = ANCHOR
    batch = statistic.batch
    return Normalize.apply(
        x, weight, bias, anchor, batch.mean, batch.invstd(eps), mask, statistic.gradient_means
    )


def _needs_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def backward_pass() -> int:
    """The number of the backward pass that is running; -1 outside of one."""
    # Not a documented function; FSDP2 relies on it too, and a test notices if it changes.
    return torch._C._current_graph_task_id()


def may_be_repeated() -> bool:
    """Whether activation checkpointing may repeat the forward that runs.

    Its re-entrant kind makes the first forward within that of a Function, where forward-mode
    gradients are off, which they are not under `no_grad`; the other kind has hooks on what autograd
    saves, as some that do not repeat do too.
    """
    # Not documented functions; a test notices if they change.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
    if torch.is_grad_enabled():
        return hooks is not None
    return not (torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


def is_recomputing() -> bool:
    """Whether this forward repeats an earlier one inside a backward pass, as activation
    checkpointing does.

    Exchanges are made again, since every worker repeats them; statistics must not be updated again.
    Code that is being compiled does not know: see `traced.unless_repeated`.
    """
    return not torch.compiler.is_compiling() and backward_pass() != -1
