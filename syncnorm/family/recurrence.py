"""The recurrences of online normalisation over the samples of a batch, see `syncnorm.family.online`."""

from __future__ import annotations

import torch
from torch import Tensor

from syncnorm.family.passes import per_sample


def forward(
    x: Tensor, mean: Tensor, var: Tensor, rate: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise each sample of x (N, C, *S) by the statistics before it.

    Returns:
        y; 1 / sqrt(var + eps) before each sample, (N, C); mean and var after the last, (C,).
    """
    mu = over_positions(x)
    v = over_positions((x - per_sample(mu, x)).square())
    means = scan(1 - rate, rate * mu, mean)
    spread = rate * v + (1 - rate) * rate * (mu - means[:-1]).square()
    variances = scan(1 - rate, spread, var)
    invstd = (variances[:-1] + eps).rsqrt()
    y = (x - per_sample(means[:-1], x)) * per_sample(invstd, x)
    return y, invstd, means[-1], variances[-1]


def backward(
    grad: Tensor, y: Tensor, invstd: Tensor, u: Tensor, v: Tensor, rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Correct the gradient of each sample by what those before it have left.

    Returns:
        The gradient of x; u and v after the last sample, (C,).
    """
    along_y = scan(1 - rate * over_positions(y.square()), over_positions(grad * y), v)
    h = (grad - rate * per_sample(along_y[:-1], y) * y) * per_sample(invstd, y)
    along_1 = scan(1 - rate, over_positions(h), u)
    return h - rate * per_sample(along_1[:-1], y), along_1[-1], along_y[-1]


def scan(factors: Tensor | float, terms: Tensor, start: Tensor) -> Tensor:
    """Find the states s_0 = start, s_t = factors_t s_(t-1) + terms_t, in a logarithm of steps.

    Args:
        factors: (N, C), or one for all.
        terms: (N, C), float64.
        start: (C,).

    Returns:
        (N + 1, C), float64.
    """
    start = start.double()
    factors = factors * torch.ones_like(terms)
    # Each (factor, term) maps a state to a later one; every round joins twice as many samples.
    reach = 1
    while reach < len(terms):
        joined = terms[reach:] + factors[reach:] * terms[:-reach]
        terms = torch.cat([terms[:reach], joined])
        factors = torch.cat([factors[:reach], factors[reach:] * factors[:-reach]])
        reach *= 2
    return torch.cat([start[None], factors * start + terms])


def over_positions(x: Tensor) -> Tensor:
    """Take the means (N, C) of x (N, C, *S) over its positions; float64."""
    if x.ndim == 2:
        return x.double()
    return x.mean(tuple(range(2, x.ndim)), dtype=torch.float64)
