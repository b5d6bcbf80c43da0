"""Sums of what enters the normalisation layers, part by part, over all workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm import checks
from syncnorm.diagnose.problem import Forward, Problem
from syncnorm.family.layer import Pooling
from syncnorm.family.mean_square import SquareNorm
from syncnorm.module import SyncNorm


@dataclass(frozen=True)
class Sums:
    """What has entered one layer, in float64.

    Args:
        count: values per channel of each batch and part, (K, P); under a mask the sum of weights.
        total: sum of x - pivot, (K, P, C); under a mask weighted, as all sums are.
        square: sum of (x - pivot)^2, (K, P, C).
        by_sample: sum over samples of (sum of x - pivot)^2 / values of the sample, (K, P, C).
        pivot: (C,).
        calls: of the layer in a forward of the model.
    """

    count: Tensor
    total: Tensor
    square: Tensor
    by_sample: Tensor
    pivot: Tensor
    calls: float

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance over everything, (C,) each."""
        return moments(self.count.sum(), self.total.sum((0, 1)), self.square.sum((0, 1)), self)


def moments(count: Tensor, total: Tensor, square: Tensor, of: Sums) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, from sums about the pivot."""
    n = at_least_something(count)
    mean = total / n
    return of.pivot + mean, (square / n - mean.square()).clamp(min=0)


def at_least_something(count: Tensor) -> Tensor:
    """Put 1 in the place of 0, to divide by; a sum of weights may be less than 1."""
    return torch.where(count > 0, count, 1.0)


def watched(model: nn.Module) -> dict[str, Any]:
    """Find the layers that normalise by statistics of the batch, by name."""
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, _BatchNorm) or (isinstance(m, Pooling) and hasattr(m, "num_features"))
    }


def pools(layer: nn.Module) -> bool:
    """True if a layer normalises by statistics of all workers."""
    if isinstance(layer, SyncNorm):
        return layer.sync_mode.normalizes_pooled
    return isinstance(layer, Pooling) and layer.is_pooled


@contextmanager
def listening(model: nn.Module, receive: Callable[[str, Tensor, Tensor], object]) -> Iterator[None]:
    """Call `receive` before each forward of a layer of `watched`.

    With its name, its input (N, C, *S), and the weights of its statistics (N, 1, *S).
    """

    def hook(name: str) -> Callable[..., None]:
        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            receive(name, *_given(layer, args, kwargs))

        return before

    with ExitStack() as stack:
        for name, layer in watched(model).items():
            handle = layer.register_forward_pre_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _given(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The input of a call, and its weights: those of a mask, or 1."""
    x, mask = checks.input_of(args, kwargs), None
    if isinstance(layer, SyncNorm | SquareNorm):
        mask = args[1] if len(args) > 1 else kwargs.get("mask")
    return x, torch.ones_like(x[:, :1]) if mask is None else checks.expand_mask(mask, x)


@torch.no_grad()
def observe(
    problem: Problem, batches: Sequence[int], *, with_noise: bool = False
) -> tuple[float, dict[str, Sums]]:
    """Compute the loss normalised by batches, and the sums of what enters each layer.

    *Collectives*: those of the forwards, and one sum of P (3C + 1) numbers for each layer and
    batch, 1 for each layer and 2; every worker must call.

    Returns:
        The loss, and the sums by layer.
    """
    layers, places = watched(problem.model), {number: k for k, number in enumerate(batches)}
    size = len(batches), problem.parts
    sums = {n: problem.zeros(*size, 3 * m.num_features + 1) for n, m in layers.items()}
    pivots = {name: pivot_of(layer, problem) for name, layer in layers.items()}
    calls = {name: problem.zeros(1) for name in layers}
    loss, forwards, counts = problem.zeros(1), problem.zeros(1), problem.total(batches)

    def receive(name: str, x: Tensor, weights: Tensor) -> None:
        number, forward = problem.under_way
        calls[name] += 1
        cut = (split(t.double().movedim(1, -1), forward) for t in (x, weights))
        for (part, values), (_, w) in zip(*cut, strict=True):
            sums[name][places[number], part] += _sums(values - pivots[name], w)

    with problem.training(with_noise=with_noise), listening(problem.model, receive):
        for _, _, terms in problem.losses(batches):
            loss += problem.share(terms, counts).double()
            forwards += 1
    message = [loss, forwards, *calls.values(), *(each.flatten() for each in sums.values())]
    sizes = [1, 1, len(calls), *(each.numel() for each in sums.values())]
    value, number, times, *parts = problem.sum(torch.cat(message), "activations").split(sizes)
    rates = (times / number.clamp(min=1)).tolist()
    pooled = {}
    for (name, like), flat, rate in zip(sums.items(), parts, rates, strict=True):
        channels = layers[name].num_features
        count, total, square, by_sample = flat.view_as(like).split([1, *[channels] * 3], -1)
        pooled[name] = Sums(count.squeeze(-1), total, square, by_sample, pivots[name], rate)
    return value.item(), pooled


def pivot_of(layer: Any, problem: Problem) -> Tensor:
    """The running mean, which is the same on all workers; 0 where there is none, or it is broken."""
    mean = getattr(layer, "running_mean", None)
    if mean is None:
        return problem.zeros(layer.num_features)
    return mean.detach().to(problem.device, torch.float64).nan_to_num(0.0, 0.0, 0.0)


def split(x: Tensor, forward: Forward) -> list[tuple[int, Tensor]]:
    """Cut what a layer gets, (N, ..., C), into the parts of the batch: each (samples, values, C).

    N is a multiple of the samples. What cannot be cut (a layer that sees neither samples nor rows
    of samples) goes to the first part.
    """
    samples, channels = sum(forward.parts.values()), x.shape[-1]
    times = len(x) // samples if samples else 0
    if not samples or times * samples != len(x):
        whole = x.reshape(-1, 1, channels)
        return [(next(iter(forward.parts)), whole)] if forward.parts else []
    cut = x.reshape(samples, -1, channels).split(list(forward.parts.values()))
    return list(zip(forward.parts, cut, strict=True))


def _sums(values: Tensor, weights: Tensor) -> Tensor:
    """Sum (samples, values, C): the count, and by channel sums, squares, and squares of samples.

    Weights are (samples, values, 1).
    """
    # Something that does not count may be anything.
    values = values.masked_fill(weights == 0, 0.0)
    weighted, n = values * weights, weights.sum(1)  # (samples, 1)
    of_samples = (weighted.sum(1).square() / at_least_something(n)).sum(0)
    squares = (weighted * values).sum((0, 1))
    return torch.cat([n.sum().view(1), weighted.sum((0, 1)), squares, of_samples])
