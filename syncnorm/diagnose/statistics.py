"""Where the variance lies, and how far running statistics are from those of the data."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm.diagnose.observe import Sums, at_least_something, observe, pools, watched
from syncnorm.diagnose.population import population
from syncnorm.diagnose.problem import Problem
from syncnorm.diagnose.state import is_noise
from syncnorm.model.modes import evaluating

_FLAT = 1e-2


def measure_statistics(problem: Problem) -> dict[str, Any]:
    """Compare the parts of batches, and running statistics with those of the data.

        between_share  = mean over channels of sum of (m2 - sum over parts of m2) / sum of (m2 + n eps),
                         both sums being over batches
        chance_share   = the same of (parts - 1) / (samples - 1) m2 of the samples' means: what to
                         expect where samples are shared out at random
        part_gaps      = RMS over channels of (mean of the part - mean) / sqrt(var + eps)
        mean_gap       = RMS over channels of (running_mean - mean) / sqrt(var + eps)
        var_gap        = RMS over channels of log((running_var + eps) / (var + eps)) / 2
        flat_share     = share of channels with var < eps / 100

    mean and var are those of all batches, as training normalises the layers before, weighted by
    masks; `loss` is that of training, of evaluation, and of evaluation by mean and var, unbiased as
    running variances are (layers with other running statistics keep theirs). values is the number
    per channel in a statistic. Nothing is flat where there are not several values.

    *Statistics*: those of the training, running statistics frozen. m2 is the sum of squared
    deviations, a part what one worker of the training has, on however many workers this is computed.

    *Collectives*: those of three passes and of `observe` (four and two with dropout); every worker
    must call.

    Returns:
        "loss", "samples" of a statistic, "layers" by name. "noise_ratio" is the variance with
        dropout over that without it, None without dropout: it alone depends on the workers.

    References:
        Wu and Johnson, Rethinking "Batch" in BatchNorm, arXiv:2105.07576, section 3, for the gap of
        running statistics; Li et al., arXiv:1801.05134, for the shift of variance by dropout.
    """
    loss, sums = observe(problem, problem.everything)
    noisy: dict[str, Sums] = {}
    if any(is_noise(m) and getattr(m, "p", 1) for m in problem.model.modules()):
        _, noisy = observe(problem, problem.everything, with_noise=True)
    with population(problem, sums), evaluating(problem.model):
        local = problem.local_loss(problem.everything)
    by_population = problem.sum(local.view(1), "evaluation loss").item()
    return {
        "loss": {
            "training": loss,
            "evaluation": problem.evaluation_loss,
            "population": by_population,
        },
        "parts": problem.parts,
        "samples": problem.samples,
        "layers": {name: _figures(problem, name, sums[name], noisy.get(name)) for name in sums},
    }


def _figures(
    problem: Problem, name: str, sums: Sums, noisy: Sums | None
) -> dict[str, float | int | bool | list[float] | None]:
    layer = watched(problem.model)[name]
    eps, n = float(getattr(layer, "eps", 0.0)), sums.count
    mean, var = sums.moments()
    sigma = (var + eps).sqrt()
    samples = problem.sizes.sum(1)
    between, chance = _between(problem, sums, eps)
    known = n.sum((0,)) > 0  # (P,)
    gaps = (_part_means(sums) - mean) / sigma  # (P, C)
    noise = None
    if noisy is not None:
        noise = _finite(((noisy.moments()[1] + eps) / (var + eps)).mean())
    values = n.sum(1).min() / samples.min().clamp(min=1) * problem.samples / max(1, sums.calls)
    flat = (var < _FLAT * eps).double().mean() if n.sum() > 1 else torch.zeros(())
    return {
        "between_share": _finite(between),
        "chance_share": _finite(chance),
        "part_gaps": torch.where(known, _rms(gaps), 0.0).tolist(),
        **_running_gaps(layer, mean, var, n.sum(), eps),
        "flat_share": _finite(flat),
        "values": _finite(values),
        "noise_ratio": noise,
        "momentum": getattr(layer, "momentum", None),
        "is_frozen": name in problem.frozen,
        "recalibrates": isinstance(layer, _BatchNorm),
        "is_pooled": pools(layer),
        "pools_running": bool(getattr(layer, "is_pooled", False)),
    }


def _between(problem: Problem, sums: Sums, eps: float) -> tuple[Tensor, Tensor]:
    """The share of the variance that lies between the parts of a batch, and that by chance, ()."""
    n = at_least_something(sums.count).unsqueeze(-1)  # (K, P, 1)
    within = (sums.square - sums.total.square() / n).clamp(min=0).sum(1)  # (K, C)
    count, total, square, by_sample = (
        each.sum(1) for each in (sums.count, sums.total, sums.square, sums.by_sample)
    )
    of_mean = total.square() / at_least_something(count).unsqueeze(-1)
    m2, between_samples = (square - of_mean).clamp(min=0), (by_sample - of_mean).clamp(min=0)
    all_of_it = m2.sum(0) + count.sum() * eps
    parts, samples = (problem.sizes > 0).sum(1), problem.sizes.sum(1)
    odds = (parts - 1).clamp(min=0) / (samples - 1).clamp(min=1)  # (K,)
    chance = (odds.unsqueeze(-1) * between_samples).sum(0)
    between = (m2 - within).clamp(min=0).sum(0)
    return (between / all_of_it).mean(), (chance / all_of_it).mean()


def _part_means(sums: Sums) -> Tensor:
    n = at_least_something(sums.count.sum(0)).unsqueeze(-1)
    return sums.pivot + sums.total.sum(0) / n


def _running_gaps(
    layer: Any, mean: Tensor, var: Tensor, count: Tensor, eps: float
) -> dict[str, float | None]:
    running_mean = getattr(layer, "running_mean", None)
    running_var = getattr(layer, "running_var", None)
    if running_mean is None or running_var is None or not count > 0:
        return {"mean_gap": None, "var_gap": None}
    running_mean, running_var = running_mean.double(), running_var.double()
    logs = ((running_var + eps) / (var + eps)).log() / 2
    return {
        "mean_gap": _finite(_rms((running_mean - mean) / (var + eps).sqrt())),
        "var_gap": _finite(_rms(logs)),
    }


def _rms(values: Tensor) -> Tensor:
    """Root mean square over the last dimension."""
    return values.square().mean(-1).sqrt()


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
