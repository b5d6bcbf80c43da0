"""Defects of the family's methods, each in the package of this process while its block lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import PropertyMock, patch

import torch
from torch import Tensor

from syncnorm.family import balanced, batch_norm, channel, evonorm, l1, region
from syncnorm.family.layer import Pooling


def unpooled() -> AbstractContextManager[Any]:
    """Each worker takes its own statistics."""
    return patch.object(Pooling, "group", PropertyMock(return_value=None))


@contextmanager
def about_its_own_mean() -> Iterator[None]:
    """The estimate of the variance follows deviations from the batch's mean."""

    def by_estimates(layer: batch_norm.PooledBatchNorm, x: Tensor) -> Tensor:
        moments = channel.pooled_moments(x.detach(), [None], layer.group, layer)
        layer.follow(moments.count[0], mean=moments.mean[0], var=moments.var[0])
        return layer.evaluate(x)

    with patch.object(channel, "by_estimates", by_estimates):
        yield


@contextmanager
def estimates_before() -> Iterator[None]:
    """What normalises is the estimate from before the batch."""
    true = channel.by_estimates

    def by_estimates(layer: batch_norm.PooledBatchNorm, x: Tensor) -> Tensor:
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
    true = batch_norm.pooled_moments

    def pooled_moments(*arguments: Any) -> Any:
        moments = true(*arguments)
        object.__setattr__(moments, "count", moments.count * 1e12)
        return moments

    with patch.object(batch_norm, "pooled_moments", pooled_moments):
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


@contextmanager
def constant_variance() -> Iterator[None]:
    """The gradient leaves out that the batch's variance is a function of x."""
    true = evonorm._gradient

    def gradient(*arguments: Tensor) -> tuple[Tensor, ...]:
        of_x, of_left, *others = true(*arguments)
        return of_x, torch.zeros_like(of_left), *others

    with patch.multiple(evonorm, _gradient=gradient, _gradient_in_blocks=gradient):
        yield


def own_variance_unused() -> AbstractContextManager[Any]:
    """A sample's deviation is the root of its mean square."""
    true = evonorm.sample_sums

    def sample_sums(x: Tensor) -> Tensor:
        return true(x) * torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1)

    return patch.object(evonorm, "sample_sums", sample_sums)


def mean_deviation_as_it_is() -> AbstractContextManager[Any]:
    """The mean absolute deviation is not made a standard deviation."""
    return patch.object(l1, "_NORMAL", 1.0)


def constant_mean() -> AbstractContextManager[Any]:
    """The gradient leaves out that the deviations are from a mean, which is a function of x."""
    true = l1.pooled_sum

    def pooled_sum(local: Tensor, *arguments: Any) -> Tensor:
        total = true(local, *arguments)
        return total.detach() + 0 * total if len(local) % 2 == 0 else total

    return patch.object(l1, "pooled_sum", pooled_sum)


def regions_together() -> AbstractContextManager[Any]:
    """Both regions are normalised by the statistics of the whole."""
    true = region.pooled_moments

    def pooled_moments(x: Tensor, weights: Any, *arguments: Any) -> Any:
        return true(x, [torch.ones_like(each) for each in weights], *arguments)

    return patch.object(region, "pooled_moments", pooled_moments)


DEFECTS: dict[tuple[str, str], Callable[[], AbstractContextManager[Any]]] = {
    ("evo_b0", "unpooled"): unpooled,
    ("evo_b0", "constant_variance"): constant_variance,
    ("evo_b0", "own_variance_unused"): own_variance_unused,
    ("evo_b1", "constant_variance"): constant_variance,
    ("evo_b2", "constant_variance"): constant_variance,
    ("l1", "unpooled"): unpooled,
    ("l1", "mean_deviation_as_it_is"): mean_deviation_as_it_is,
    ("l1", "constant_mean"): constant_mean,
    ("region", "unpooled"): unpooled,
    ("region", "regions_together"): regions_together,
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
