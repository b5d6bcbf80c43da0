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


def estimated_batch_norm(
    x: Tensor, state: dict[str, Tensor], eps: float, momentum: float
) -> Tensor:
    """Normalisation by estimates that have followed the batch; updates `state`. arXiv:1903.10520.

    github.com/joe-siyuan-qiao/Batch-Channel-Normalization, EstBN.
    """
    return affine(_by_estimates(x, state, eps, momentum), state["weight"], state["bias"])


def batch_channel_norm(
    x: Tensor,
    state: dict[str, Tensor],
    groups: int,
    estimate: bool,
    eps: float,
    momentum: float,
) -> Tensor:
    """A batch norm, then a normalisation of a sample's groups of channels; updates `state`.

    arXiv:1903.10520.
    """
    z = (_by_estimates if estimate else _by_batch)(x, state, eps, momentum)
    z = affine(z, state["weight"], state["bias"])
    grouped = z.reshape(z.shape[0], groups, -1)
    mean = grouped.mean(2, keepdim=True)
    std = ((grouped - mean).square().mean(2, keepdim=True) + eps).sqrt()
    y = (grouped - mean) / std * state["group_weight"].view(1, -1, 1)
    return (y + state["group_bias"].view(1, -1, 1)).reshape(z.shape)


def membrane_batch_norm(x: Tensor, state: dict[str, Tensor], eps: float, momentum: float) -> Tensor:
    """Batch normalisation of the potential of a time step; updates `state`. arXiv:2308.08359."""
    return affine(_by_batch(x, state, eps, momentum), state["weight"], state["bias"])


def balanced_batch_norm(
    x: Tensor,
    tasks: Tensor,
    state: dict[str, Tensor],
    kappa: float,
    eps: float,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """Normalisation that balances tasks, and the term of its loss; updates `state`.

    arXiv:2310.08855. A task that is not in the batch has no weight.
    """
    x = x.double()
    present = tasks.unique().tolist()
    n = {t: int((tasks == t).sum()) for t in present}
    concentration = {t: state["psi"][t].exp() + n[t] for t in present}
    total = torch.stack([*concentration.values()]).sum()
    w = torch.stack([concentration[t] / total / n[t] for t in tasks.tolist()])[:, None]
    mean = (w * x.flatten(2).mean(2)).sum(0)
    var = (w * (x - channels(mean, x)).square().flatten(2).mean(2)).sum(0)
    state["num_batches_tracked"] += 1
    eta = momentum**kappa
    for _ in range(int(state["num_batches_tracked"]) - 1):
        eta = eta / (eta + (1 - momentum) ** kappa)
    state["running_mean"] += eta * (mean.detach() - state["running_mean"])
    state["running_var"] += eta * (var.detach() - state["running_var"])
    loss = (mean - state["running_mean"]).square().mean()
    loss = loss + (var - state["running_var"]).square().mean()
    y = (x - channels(mean, x)) / (channels(var, x) + eps).sqrt()
    return affine(y, state["weight"], state["bias"]), loss


def _by_batch(x: Tensor, state: dict[str, Tensor], eps: float, momentum: float) -> Tensor:
    n, mean, var = moments(x, None)
    if n > 0:
        state["num_batches_tracked"] += 1
        state["running_mean"] += momentum * (mean.detach() - state["running_mean"])
    if n > 1:
        unbiased = var.detach() * n / (n - 1)
        state["running_var"] += momentum * (unbiased - state["running_var"])
    return standardised(x, n, mean, var, eps)


def _by_estimates(x: Tensor, state: dict[str, Tensor], eps: float, momentum: float) -> Tensor:
    x = x.double()
    mean, var = state["running_mean"], state["running_var"]
    n, batch_mean, _ = moments(x.detach(), None)
    if n > 0:
        dims = [0, *range(2, x.ndim)]
        about_estimate = (x.detach() - channels(mean, x)).square().sum(dims) / n
        var += momentum * (about_estimate - var)
        mean += momentum * (batch_mean - mean)
        state["num_batches_tracked"] += 1
    return (x - channels(mean, x)) / (channels(var, x) + eps).sqrt()
