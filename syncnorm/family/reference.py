"""The oracles of the family: the papers' equations in float64, in one process, on the whole batch.

As `syncnorm.reference`: written to be compared with the papers, sharing no code with the layers.
Each takes and moves the layer's state dict. Gradients come from autograd through these lines; where
a method has a gradient of its own, that stands here as its paper gives it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from syncnorm.reference import affine, channels, moments, standardised


def evo_norm(
    x: Tensor, state: dict[str, Tensor], variant: str, eps: float, momentum: float
) -> Tensor:
    """EvoNorm-B0, B1 or B2 in training mode; updates `state`. arXiv:2004.02967, table 1."""
    x = x.double()
    n, _, var = moments(x, None)
    mean_square = x.flatten(2).square().mean(2)  # (N, C)
    instance_var = mean_square - x.flatten(2).mean(2) ** 2
    shape = (*mean_square.shape, *[1] * (x.ndim - 2))
    if variant == "b0":
        other = channels(state["v"], x) * x + (instance_var + eps).sqrt().view(shape)
    elif variant == "b1":
        other = (x + 1) * (mean_square + eps).sqrt().view(shape)
    else:
        other = (mean_square + eps).sqrt().view(shape) - x
    left = (channels(var, x) + eps).sqrt().expand_as(x)
    y = x / torch.where(left > other, left, other)
    if n > 0:
        unbiased = var.detach() * n / (n - 1).clip(min=1)
        state["running_var"] += momentum * (unbiased - state["running_var"])
        state["num_batches_tracked"] += 1
    return affine(y, state["weight"], state["bias"])


def l1_batch_norm(x: Tensor, state: dict[str, Tensor], eps: float, momentum: float) -> Tensor:
    """Normalisation by the mean absolute deviation; updates `state`. arXiv:1802.09769."""
    x = x.double()
    n, mean, _ = moments(x, None)
    centered = x - channels(mean, x)
    deviation = centered.abs().transpose(0, 1).flatten(1).sum(1) / n * math.sqrt(math.pi / 2)
    if n > 0:
        for name, value in (("mean", mean), ("deviation", deviation)):
            running = state[f"running_{name}"]
            running += momentum * (value.detach() - running)
        state["num_batches_tracked"] += 1
    return affine(centered / (channels(deviation, x) + eps), state["weight"], state["bias"])


def region_norm(x: Tensor, mask: Tensor, state: dict[str, Tensor], eps: float) -> Tensor:
    """Normalisation of a mask and its complement apart. arXiv:1911.10375, section 3."""
    x = x.double()
    y = torch.zeros_like(x)
    for region, weight, bias in zip((mask, 1 - mask), state["weight"], state["bias"]):
        n, mean, var = moments(x, region)
        y = y + region * affine(standardised(x, n, mean, var, eps), 1 + weight, bias)
    return y
