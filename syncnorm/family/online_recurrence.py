"""The recurrences of online normalisation over the samples of a batch, see `syncnorm.family.online`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from syncnorm.family.passes import blocks, over_positions, per_sample


def forward(
    x: Tensor, mean: Tensor, var: Tensor, rate: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise each sample of x (N, C, *S) by the statistics before it.

    Returns:
        y; 1 / sqrt(var + eps) before each sample, (N, C); mean and var after the last, (C,).
    """
    rate = rate if x.numel() else 0.0  # samples without positions say nothing
    mu, v = x.new_zeros(2, *x.shape[:2], dtype=torch.float64)
    for block, mean_of, var_of in blocks(x, mu, v):
        mean_of.copy_(over_positions(block) / _places(x))
        var_of.copy_(over_positions((block - per_sample(mean_of, x)).square_()) / _places(x))
    means = scan(1 - rate, rate * mu, mean)
    spread = rate * v + (1 - rate) * rate * (mu - means[:-1]).square()
    variances = scan(1 - rate, spread, var)
    invstd, y = (variances[:-1] + eps).rsqrt(), torch.empty_like(x)
    for out, block, m, s in blocks(y, x, per_sample(means[:-1], x), per_sample(invstd, x)):
        torch.sub(block, m, out=out).mul_(s)
    return y, invstd, means[-1], variances[-1]


def backward(
    grad: Tensor, y: Tensor, invstd: Tensor, u: Tensor, v: Tensor, rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Correct the gradient of each sample by what those before it have left.

    Returns:
        The gradient of x; u and v after the last sample, (C,).
    """
    rate = rate if y.numel() else 0.0
    squares, products, means = y.new_zeros(3, *y.shape[:2], dtype=torch.float64)
    for g, block, square, product in blocks(grad, y, squares, products):
        square.copy_(over_positions(block.square()) / _places(y))
        product.copy_(over_positions(g * block) / _places(y))
    along_y = scan(1 - rate * squares, products, v)
    grad_x, left, factor = torch.empty_like(y), rate * along_y[:-1], per_sample(invstd, y)
    for out, mean, g, block, a, b in blocks(grad_x, means, grad, y, per_sample(left, y), factor):
        torch.sub(g, block * a, out=out).mul_(b)
        mean.copy_(over_positions(out) / _places(y))
    along_1 = scan(1 - rate, means, u)
    for out, a in blocks(grad_x, per_sample(rate * along_1[:-1], y)):
        out -= a
    return grad_x, along_1[-1], along_y[-1]


def _places(x: Tensor) -> int:
    return max(1, math.prod(x.shape[2:]))


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
