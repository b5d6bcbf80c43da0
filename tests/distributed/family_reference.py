"""The oracles of the family: the papers' equations in float64, in one process, on the whole batch.

As `syncnorm.reference`: written to be compared with the papers, sharing no code with the layers.
Each takes and moves the layer's state dict. Gradients come from autograd through these lines; where
a method has a gradient of its own, that stands here as its paper gives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from syncnorm.reference import affine, channels, moments, standardised


def close(got: Tensor, expected: Tensor) -> None:
    """The tolerance of float64."""
    torch.testing.assert_close(got, expected.detach(), rtol=1e-10, atol=1e-10)


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
    x, mask = x.double(), mask.double()
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


def power_norm(
    x: Tensor,
    mask: Tensor | None,
    state: dict[str, Tensor],
    *,
    eps: float = 1e-5,
    alpha: float = 0.9,
    beta: float = 0.9,
    warmup: int,
    groups: int = 1,
) -> Tensor:
    """Power normalisation in training mode; moves `state`. arXiv:2003.07845, algorithm 2."""
    x = x.double()
    if groups:
        grouped = x.view(x.shape[0], groups, -1, *x.shape[2:])
        x = (grouped / (grouped.square().mean(2, keepdim=True) + eps).sqrt()).view(x.shape)
    w, n = _weights(x, mask)
    if n == 0:
        return affine(x, state["weight"], state["bias"])
    step = state["num_batches_tracked"] = state["num_batches_tracked"] + 1
    psi, nu = state["running_square"], state["nu"]
    q = _sum(w * x.detach().square()) / n
    used = q if step <= warmup else psi
    if step <= warmup:
        psi = psi * (step - 1) / step + q / step
    state["running_square"] = alpha * psi + (1 - alpha) * q
    sigma = channels((used + eps).sqrt(), x)
    z = x.detach() / sigma

    def gradient(g: Tensor) -> Tensor:
        approximate = g - w * channels(nu, x) * z
        gamma, big_lambda = _sum(w * z * z) / n, _sum(g * z) / n
        state["nu"] = state["nu"] + (1 - beta) * (big_lambda - nu * gamma)
        return approximate / sigma

    return affine(_with_gradient(x, z, gradient), state["weight"], state["bias"])


def mabn(
    x: Tensor,
    mask: Tensor | None,
    state: dict[str, Tensor],
    *,
    eps: float = 1e-5,
    momentum: float = 0.02,
    warmup: int,
    renorm_after: int,
    lagged: bool,
) -> Tensor:
    """MABN in training mode; moves `state`. arXiv:2001.06838, as in its authors' code."""
    x = x.double()
    w, n = _weights(x, mask)
    step = state["num_batches_tracked"] = state["num_batches_tracked"] + 1
    squares, running = state["squares"].clone(), state["running_square"]
    before, c_before = squares.mean(0), state["gradients"].mean(0)
    is_alone = step <= len(squares) or step < warmup
    squares[step % len(squares)] = q = _sum(w * x.detach().square()) / n
    s2 = q if is_alone else squares.mean(0)
    used = before if lagged and not is_alone else s2
    r = ((used + eps) / (running + eps)).sqrt().clip(0.2, 5)
    if step <= max(renorm_after, warmup):
        r = torch.ones_like(r)
    state["squares"], state["running_square"] = squares, (1 - momentum) * running + momentum * s2
    sigma = channels((used + eps).sqrt(), x)
    z = x.detach() / sigma

    def gradient(g: Tensor) -> Tensor:
        gradients = state["gradients"].clone()
        gradients[step % len(gradients)] = b = _sum(g * z) / n
        state["gradients"] = gradients
        c = b if is_alone else c_before if lagged else gradients.mean(0)
        return (g - w * channels(c, x) * z) / sigma

    return affine(channels(r, x) * _with_gradient(x, z, gradient), state["weight"], state["bias"])


def unified_norm(
    x: Tensor,
    mask: Tensor | None,
    state: dict[str, Tensor],
    *,
    eps: float = 1e-5,
    momentum: float = 0.1,
    warmup: int,
    renorm_after: int,
    outlier_filtration: bool,
    lagged: bool,
) -> Tensor:
    """UN in training mode; moves `state`. arXiv:2208.01313, as in its authors' code."""
    x = x.double()
    w, n = _weights(x, mask)
    step = state["num_batches_tracked"] = state["num_batches_tracked"] + 1
    squares, running, ema = state["squares"].clone(), state["running_square"], state["gradient"]
    before = squares.log().mean(0).exp()
    is_alone = is_warm = bool(step <= len(squares) or step < warmup)
    recorded = squares.sqrt().var()
    squares[step % len(squares)] = q = _sum(w * x.detach().square()) / n
    is_outlier = False
    if outlier_filtration and not is_warm:
        gap = squares.mean(0) - squares.log().mean(0).exp()
        if bool((gap > len(squares) * recorded).any()):
            squares[step % len(squares)] = running
            is_outlier = is_alone = True
    s2 = q if is_alone else squares.log().mean(0).exp()
    used = before if lagged and not is_warm else s2
    r = ((used + eps) / (running + eps)).sqrt().clip(0.2, 5)
    if step <= max(renorm_after, warmup) or (is_outlier and not lagged):
        r = torch.ones_like(r)
    state["squares"], state["running_square"] = squares, (1 - momentum) * running + momentum * s2
    sigma = channels((used + eps).sqrt(), x)
    z = x.detach() / sigma

    def gradient(g: Tensor) -> Tensor:
        g = g * channels(r, x)
        b, last = _sum(g * z) / n, state["gradient"]
        gradients = state["gradients"].clone()
        gradients[step % len(gradients)] = last if is_outlier else b
        mean = b if is_alone else gradients.mean(0)
        state["gradients"] = gradients
        state["gradient"] = (1 - momentum) * last + momentum * mean
        c = mean if is_outlier else state["gradient"]
        c = ema if lagged and not is_warm else c
        return (g - w * channels(c, x) * z) / sigma

    return affine(_with_gradient(x, z, gradient), state["weight"], state["bias"])


def online_norm(
    x: Tensor,
    state: dict[str, Tensor],
    sizes: tuple[int, ...],
    *,
    eps: float = 1e-5,
    alpha: float = 0.999,
    beta: float = 0.99,
    guard: str | None,
) -> Tensor:
    """Online normalisation in training mode; moves `state`. arXiv:1905.05894, section 3.

    The batch is that of several workers, the first of which has `sizes[0]` samples, and so on.
    Each goes through its own; state["workers"], (W, 4, C), has what each knows.
    """
    x = x.double()
    names = ("running_mean", "running_var", "u", "v")
    if "workers" not in state:
        state["workers"] = torch.stack([state[n] for n in names]).repeat(len(sizes), 1, 1)
    known, share = state["workers"].clone(), torch.tensor(sizes, dtype=torch.float64) / len(x)
    state["num_batches_tracked"] = state["num_batches_tracked"] + 1
    averages = len(sizes) > 1
    worker_of = [worker for worker, size in enumerate(sizes) for _ in range(size)]
    y, sigmas = torch.empty_like(x), []
    for t, worker in enumerate(worker_of):
        mu = x[t].detach().flatten(1).mean(1)
        v = x[t].detach().flatten(1).var(1, unbiased=False)
        m, var = known[worker, 0].clone(), known[worker, 1].clone()
        sigmas.append(channels((var + eps).sqrt(), x)[0])
        y[t] = (x[t].detach() - channels(m, x)[0]) / sigmas[t]
        known[worker, 0] = alpha * m + (1 - alpha) * mu
        known[worker, 1] = alpha * var + (1 - alpha) * v + alpha * (1 - alpha) * (mu - m) ** 2
    if averages:
        mean = (share[:, None] * known[:, 0]).sum(0)
        known[:, 1] = (share[:, None] * (known[:, 1] + (known[:, 0] - mean) ** 2)).sum(0)
        known[:, 0] = mean

    def gradient(g: Tensor) -> Tensor:
        dx = torch.empty_like(g)
        for t, worker in enumerate(worker_of):
            u, v = known[worker, 2].clone(), known[worker, 3].clone()
            h = g[t] - (1 - beta) * channels(v, x)[0] * y[t]
            known[worker, 3] = v + (h * y[t]).flatten(1).mean(1)
            dx[t] = h / sigmas[t] - (1 - beta) * channels(u, x)[0]
            known[worker, 2] = u + dx[t].flatten(1).mean(1)
        if averages:
            known[:, 2:] = (share[:, None, None] * known[:, 2:]).sum(0)
        state["workers"] = known
        state.update(zip(names, known[0]))
        return dx

    z = affine(_with_gradient(x, y, gradient), state["weight"], state["bias"])
    if guard == "layer_scaling":
        return z / (z.square().flatten(1).mean(1) + eps).sqrt().view(-1, *[1] * (x.ndim - 1))
    return z if guard is None else z.clip(-5, 5)


def _weights(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mask as w, (N, 1, *S), and n = sum w."""
    w = torch.ones_like(x[:, :1]) if mask is None else mask.double()
    return w, w.sum()


def _sum(t: Tensor) -> Tensor:
    """The sums (C,) of t (N, C, *S)."""
    return t.transpose(0, 1).flatten(1).sum(1)


def _with_gradient(x: Tensor, value: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
    """The value, by which x has the gradient that is said."""
    z = value + (x - x.detach())
    if z.requires_grad:
        z.register_hook(gradient)
    return z
