"""The shift of distributions in front of the normalisation layers since an early checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from syncnorm.diagnose.observe import listening, observe, watched
from syncnorm.diagnose.problem import Problem
from syncnorm.model.modes import kept

# An odd number: a channel that has one value has it in the middle of a bin.
BINS, _REACH, _PRIOR = 63, 8.0, 0.5


def measure_shift(problem: Problem, early: nn.Module) -> dict[str, Any]:
    """Measure how far each channel's values in front of a normalisation have moved since `early`.

        gaussian  = log(s / s1) + (s1^2 + (mu1 - mu)^2) / (2 s^2) - 1/2
        histogram = sum over bins of p1 log(p1 / p)      p = (count + 1/2) / (n + B/2)

    the Kullback-Leibler divergence D(p1 || p) of the early distribution from the present one, by
    their moments (s^2 = var + eps) and by B = 63 bins over both means -+ 8 standard deviations, the
    outer ones open.

    *Collectives*: those of four passes over the batches, and the sums of `observe` and of B C
    numbers per layer, twice each; every worker must call.

    Args:
        problem: of the present model.
        early: a model of the same structure; it is not changed.

    Returns:
        "layers" by name: "gaussian" and "histogram", each with "max" and "median" over channels.

    References:
        Ioffe and Szegedy, arXiv:1502.03167, section 2, for what should move little; Santurkar et
        al., arXiv:1805.11604, section 2.1, for its doubtful part in the success of normalisation.
    """
    state = early.state_dict(keep_vars=True)
    now = problem.model.state_dict(keep_vars=True)
    _, sums = observe(problem, problem.everything)
    with _swapped(now, state):
        _, early_sums = observe(problem, problem.everything)
    moments = {n: (early_sums[n].moments(), sums[n].moments()) for n in sums}
    edges = {name: _edges(*pair) for name, pair in moments.items()}
    counts = _histograms(problem, edges)
    with _swapped(now, state):
        early_counts = _histograms(problem, edges)
    layers = watched(problem.model)
    found = {}
    for name, pair in moments.items():
        gaussian = gaussian_divergence(*pair, float(getattr(layers[name], "eps", 0.0)))
        by_bins = histogram_divergence(early_counts[name], counts[name])
        found[name] = {"gaussian": _summary(gaussian), "histogram": _summary(by_bins)}
    return {"layers": found}


@contextmanager
def _swapped(now: dict[str, Any], early: dict[str, Any]) -> Iterator[None]:
    """Give the model the early one's values within the block; what it has not stays."""
    tensors = {name: t for name, t in now.items() if isinstance(t, Tensor)}
    with kept(tensors):
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name in early and early[name].shape == tensor.shape:
                    tensor.copy_(early[name])
        yield


def gaussian_divergence(
    early: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor], eps: float
) -> Tensor:
    """Compute D(early || now) of normal distributions of these means and variances, (C,)."""
    (mu1, var1), (mu, var) = early, now
    var1, var = var1 + eps, var + eps
    return (var / var1).log() / 2 + (var1 + (mu1 - mu).square()) / (2 * var) - 0.5


def histogram_divergence(early: Tensor, now: Tensor) -> Tensor:
    """Compute D(early || now) of counts by channel and bin, (C, B) -> (C,)."""
    p1, p = ((c + _PRIOR) / (c + _PRIOR).sum(-1, keepdim=True) for c in (early, now))
    return (p1 * (p1 / p).log()).sum(-1)


def _edges(early: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Agree on the range of the bins, (C,) each: from pooled moments, so alike on all workers."""
    low, high = [], []
    for mean, var in (early, now):
        reach = _REACH * (var.sqrt() + 1e-6 * (1 + mean.abs()))
        low.append(mean - reach)
        high.append(mean + reach)
    return torch.minimum(*low), torch.maximum(*high)


@torch.no_grad()
def _histograms(problem: Problem, edges: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Count the values of each channel by bin over all workers, (C, B) by layer."""
    counts = {name: problem.zeros(len(low) * BINS) for name, (low, _) in edges.items()}

    def receive(name: str, x: Tensor, weights: Tensor) -> None:
        low, high = edges[name]
        rows = x.double().movedim(1, -1).reshape(-1, len(low))
        weights = weights.double().flatten().repeat_interleave(len(low))
        bins = ((rows - low) / (high - low) * BINS).floor().clamp(0, BINS - 1).nan_to_num(0)
        places = bins.long() + BINS * torch.arange(len(low), device=rows.device)
        counts[name] += torch.bincount(places.flatten(), weights, minlength=len(low) * BINS)

    with problem.training(), listening(problem.model, receive):
        for _ in problem.losses(problem.everything):
            pass
    message = torch.cat([problem.zeros(1), *counts.values()])
    _, *parts = problem.sum(message, "histograms").split([1, *(len(c) for c in counts.values())])
    return {name: part.view(-1, BINS) for name, part in zip(counts, parts, strict=True)}


def _summary(values: Tensor) -> dict[str, float]:
    return {"max": float(values.max()), "median": float(values.quantile(0.5))}
