"""Defects of the family's methods, each in the package of this process while its block lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import PropertyMock, patch

import torch
from torch import Tensor

from syncnorm.family import balanced, batch, channel
from syncnorm.family.layer import Pooling


def unpooled() -> AbstractContextManager[Any]:
    """Each worker takes its own statistics."""
    return patch.object(Pooling, "group", PropertyMock(return_value=None))


@contextmanager
def about_its_own_mean() -> Iterator[None]:
    """The estimate of the variance follows deviations from the batch's mean."""

    def by_estimates(layer: batch.PooledBatchNorm, x: Tensor) -> Tensor:
        moments = channel.pooled_moments(x.detach(), [None], layer.group, layer)
        layer.follow(moments.count[0], mean=moments.mean[0], var=moments.var[0])
        return layer.evaluate(x)

    with patch.object(channel, "by_estimates", by_estimates):
        yield


@contextmanager
def estimates_before() -> Iterator[None]:
    """What normalises is the estimate from before the batch."""
    true = channel.by_estimates

    def by_estimates(layer: batch.PooledBatchNorm, x: Tensor) -> Tensor:
        mean, var = layer.running_mean.clone(), layer.running_var.clone()
        true(layer, x)
        return layer.standardize(x, mean, var)

    with patch.object(channel, "by_estimates", by_estimates):
        yield


def weight_by_channel() -> AbstractContextManager[Any]:
    """The weights of groups go to other channels than their own."""
    return patch.object(Tensor, "repeat_interleave", lambda t, times: t.flip(0).repeat(times))


@contextmanager
def biased_running_variance() -> Iterator[None]:
    """The running variance follows the biased one."""
    true = batch.pooled_moments

    def pooled_moments(*arguments: Any) -> Any:
        moments = true(*arguments)
        object.__setattr__(moments, "count", moments.count * 1e12)
        return moments

    with patch.object(batch, "pooled_moments", pooled_moments):
        yield


@contextmanager
def counts_of_this_worker() -> Iterator[None]:
    """Tasks are weighted by this worker's counts, of statistics that are pooled."""
    true = balanced.pooled_sum

    def pooled_sum(local: Tensor, *arguments: Any) -> Tensor:
        total = true(local, *arguments)
        return torch.cat([local[:, :1], total[:, 1:]], 1)

    with patch.object(balanced, "pooled_sum", pooled_sum):
        yield


def momentum_alone() -> AbstractContextManager[Any]:
    """The momentum does not adapt."""
    return patch.object(balanced, "momentum_at", lambda step, momentum, kappa: momentum)


DEFECTS: dict[tuple[str, str], Callable[[], AbstractContextManager[Any]]] = {
    ("estimated", "unpooled"): unpooled,
    ("estimated", "about_its_own_mean"): about_its_own_mean,
    ("estimated", "estimates_before"): estimates_before,
    ("estimated_channel", "unpooled"): unpooled,
    ("batch_channel", "unpooled"): unpooled,
    ("batch_channel", "weight_by_channel"): weight_by_channel,
    ("membrane", "unpooled"): unpooled,
    ("membrane", "biased_running_variance"): biased_running_variance,
    ("balanced", "unpooled"): unpooled,
    ("balanced", "counts_of_this_worker"): counts_of_this_worker,
    ("balanced", "momentum_alone"): momentum_alone,
}
