"""Exact population statistics for evaluation, computed from data on all workers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from syncnorm import checks, ops
from syncnorm.comm import groups
from syncnorm.errors import FaultError, InputError
from syncnorm.layers import SyncBatchRenorm
from syncnorm.maths.moments import Moments, Raw
from syncnorm.maths.precision import sum_dtype
from syncnorm.maths.renorm import RenormSchedule
from syncnorm.model.convert.others import family_of, has_own_forward, listed
from syncnorm.model.modes import evaluating, kept
from syncnorm.model.sample import call, check_batches, check_not_lazy, uncompiled
from syncnorm.model.worker_failures import check_finite, sum_unless_failed
from syncnorm.module import SyncNorm
from syncnorm.ops import LocalSums, Statistic
from syncnorm.statistics.source import Source, uncompiled_forward

_Model = TypeVar("_Model", bound=nn.Module)


@torch.no_grad()
def recalibrate(
    model: _Model, batches: Iterable[Any], *, process_group: groups.Spec = None, mix: float = 1.0
) -> _Model:
    """Replace the running statistics by those of all workers' batches, weighted by count.

        running <- (1 - mix) * running + mix * population        population: mean, and m2 / (n - 1)

    For weights that the running statistics have not followed (averaged, pruned, quantised, loaded
    ones) and for calibration to a new domain at test time (mix < 1).

    *Statistics*: each layer sees every batch as training would give it with local statistics,
    renormalisation off, dropout and the like as in evaluation. Its sums over all batches are added
    up in float64, so the result depends on the set of batches, not on which worker had them, to
    rounding.

    *Collectives*: one all-reduce at the end. Every worker of `process_group` must call, with any
    number of batches, also none; with equally many if FSDP has sharded the model, which exchanges
    in each forward. All end with the same bits (with mix < 1, if they began with the
    same).

    Args:
        model: changed in place: running statistics of BatchNorm layers, ours and torch's, that keep
            them. Layers that are in evaluation mode while `model` trains are frozen and left alone.
            Parameters, counters, modes and gradients stay as they are.
            Layers of `syncnorm.family` keep theirs, and normalise by them.
        batches: arguments for `model`: a tensor, a mapping (keyword arguments), or a tuple or list
            that begins with what the model requires (its first element, where that is one
            argument).
        process_group: the workers whose batches count, see `syncnorm.groups`; None: all of them.
        mix: weight of the new statistics, in (0, 1].

    Returns:
        `model`.

    Raises:
        InputError: `mix` is out of range, `batches` is a single one, the model has lazy parameters,
            or there is no layer to recalibrate.
        FaultError: no worker had a batch, what comes to a layer is not finite, or the forward failed
            on another worker (the failing one raises its own error); on all workers, and nothing
            was changed.

    Warns:
        UserWarning: there are layers of `syncnorm.family` besides, which stay as they are.

    Example:
        >>> from syncnorm import SyncBatchNorm
        >>> layer = SyncBatchNorm(1)
        >>> _ = recalibrate(layer, [torch.tensor([[1.0], [3.0]]), torch.tensor([[8.0]])])
        >>> layer.running_mean.tolist(), layer.running_var.tolist()
        ([4.0], [13.0])

    References:
        Wu and Johnson, Rethinking "Batch" in BatchNorm, arXiv:2105.07576, section 3 (PreciseBN);
        Schneider et al., arXiv:2006.16971, for mix < 1. Deviation: moments are merged by count, not
        averaged over batches.
    """
    if not 0 < mix <= 1:
        raise InputError(f"`mix` must be in (0, 1], got {mix}. 1 replaces the old statistics.")
    check_batches(batches)
    check_not_lazy(model)
    # DDP's own forward would exchange, but workers have different numbers of batches.
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    layers = _layers(bare)
    left = {n: m for n, m in family_of(bare).items() if m.training or not bare.training}
    if left:
        warnings.warn(
            "recalibrate leaves the running statistics of layers of syncnorm.family as they are: "
            f"{listed(left)}. Those follow training forwards alone.",
            stacklevel=3,
        )
    group = groups.statistics_group(process_group)
    sums, failure = _collect(bare, [*layers.values()], batches)
    population = _pool(dict(zip(layers, sums, strict=True)), failure, group)
    for layer, batch in zip(layers.values(), population, strict=True):
        _blend(layer, batch, mix)
    return model


def _layers(model: nn.Module) -> dict[str, _BatchNorm]:
    layers = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, _BatchNorm)
        and not (m.running_mean is None and m.running_var is None)
        and (m.training or not model.training)
    }
    if not layers:
        raise InputError(
            "`model` must have a BatchNorm layer that keeps running statistics and is not frozen, "
            f"got none in {type(model).__name__}. Layers in evaluation mode within a model in "
            "training mode are frozen."
        )
    for name, layer in layers.items():
        checks.check_pair(layer.running_mean, layer.running_var, name)
    return layers


def _collect(
    model: nn.Module, layers: list[_BatchNorm], batches: Iterable[Any]
) -> tuple[list[Tensor], Exception | None]:
    """The raw sums of each layer over this worker's batches, and the error that ended them."""
    sums = [
        _mean(m).new_zeros(2 * m.num_features + 1, dtype=sum_dtype(_mean(m).device)) for m in layers
    ]
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        stack.enter_context(_modes(model, layers))
        for layer, total in zip(layers, sums, strict=True):
            if isinstance(layer, SyncNorm):
                stack.enter_context(_collecting_ours(layer, total.add_))
            else:
                stack.enter_context(_collecting_theirs(layer, total.add_))
        try:
            for batch in batches:
                call(model, batch, "batches")
        except Exception as error:  # sent to the other workers, then raised
            return sums, error
    return sums, None


@contextmanager
def _modes(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """The layers in training mode, everything else in evaluation mode."""
    with evaluating(model):
        for layer in layers:
            layer.training = True
        yield


class _Recording(Source):
    """Local statistics, whose sums are collected; running statistics are not updated."""

    is_lent = True
    forward = uncompiled_forward

    def __init__(self, keep: Callable[[Tensor], object]) -> None:
        self.keep = keep

    def statistic(self, layer: SyncNorm, local: LocalSums) -> Statistic:
        statistic = ops.pooled_statistic(local, None, layer.label)
        self.keep(local.sums)
        return statistic

    traced_statistic = statistic

    def record(self, layer: SyncNorm, local: LocalSums, moments: Moments) -> None:
        pass


@contextmanager
def _collecting_ours(layer: SyncNorm, keep: Callable[[Tensor], object]) -> Iterator[None]:
    layer.statistics.settle()
    source, layer.statistics = layer.statistics, _Recording(keep)
    seen = layer.seen
    schedule = getattr(layer, "schedule", None)
    with kept(dict(layer.named_buffers(recurse=False))):
        if isinstance(layer, SyncBatchRenorm):
            # Renormalisation off. Nothing of the old statistics may come through, not even NaN.
            layer.schedule = RenormSchedule.constant(1.0, 0.0)
            layer.reset_running_stats()
        try:
            yield
        finally:
            layer.statistics, layer.seen = source, seen
            if isinstance(layer, SyncBatchRenorm) and schedule is not None:
                layer.schedule = schedule


@contextmanager
def _collecting_theirs(layer: _BatchNorm, keep: Callable[[Tensor], object]) -> Iterator[None]:
    """Have a layer of torch's normalise as ours would, so that a batch of one value passes too."""

    def normalize(input: Tensor) -> Tensor:  # torch's name for the argument
        local = ops.local_sums(input, None)
        keep(local.sums)
        statistic = ops.pooled_statistic(local, None, type(layer).__name__)
        return ops.normalize(input, layer.weight, layer.bias, statistic, layer.eps, None)

    def collect(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        keep(ops.local_sums(checks.input_of(args, kwargs), None).sums)

    is_plain = not has_own_forward(layer)
    hook = None if is_plain else layer.register_forward_pre_hook(collect, with_kwargs=True)
    if is_plain:
        layer.forward = normalize
    with kept(dict(layer.named_buffers(recurse=False))):
        try:
            yield
        finally:
            if hook is None:
                del layer.forward
            else:
                hook.remove()


def _pool(
    sums: dict[str, Tensor], failure: Exception | None, group: groups.Group | None
) -> list[Raw]:
    """The moments over all workers, from one all-reduce; an error is raised on all of them."""
    device = next(iter(sums.values())).device
    message = torch.cat([s.to(device) for s in sums.values()])
    message = sum_unless_failed(message, failure, group, "population")
    pooled = message.split([s.numel() for s in sums.values()])
    check_finite(zip(sums, pooled, strict=True))
    # Each where the layer is.
    population = [Raw(own.copy_(s)) for own, s in zip(sums.values(), pooled, strict=True)]
    if all(batch.count == 0 for batch in population):
        raise FaultError(
            "`batches` must hold data on at least one worker, got none. Nothing was changed."
        )
    return population


def _blend(layer: _BatchNorm, batch: Moments, mix: float) -> None:
    """running <- (1 - mix) * running + mix * population, where the batch has values enough."""
    values = (
        (_mean(layer), batch.mean, batch.count > 0),
        (_var(layer), batch.m2 / (batch.count - 1), batch.count > 1),
    )
    for running, value, is_known in values:
        # At mix = 1 nothing of the old value may come through, not even NaN.
        mixed = value if mix == 1 else (1 - mix) * running.to(value.dtype) + mix * value
        running.copy_(torch.where(is_known, mixed, running.to(value.dtype)))


def _mean(layer: _BatchNorm) -> Tensor:
    assert layer.running_mean is not None
    return layer.running_mean


def _var(layer: _BatchNorm) -> Tensor:
    assert layer.running_var is not None
    return layer.running_var
