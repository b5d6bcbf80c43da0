"""The oracle: the papers' equations in float64, in one process, on the whole batch.

Written to be compared with the papers, not to be fast. Nothing here shares code with the layers;
gradients come from autograd through these lines.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RunningStatistics:
    """The buffers of a normalisation layer."""

    mean: Tensor
    var: Tensor
    num_batches_tracked: int = 0

    @classmethod
    def initial(cls, channels: int) -> RunningStatistics:
        """Zeros and ones, shape (C,), float64."""
        return cls(
            torch.zeros(channels, dtype=torch.float64), torch.ones(channels, dtype=torch.float64)
        )


def moments(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """n (), mean (C,) and biased variance (C,) of x (N, C, *S) in float64, differentiable in x."""
    x = x.double()
    w = (
        torch.ones_like(x)
        if mask is None
        else mask.double().expand(x.shape[0], 1, *x.shape[2:]).expand_as(x)
    )
    dims = [0, *range(2, x.ndim)]
    n = w[:, :1].sum()
    if n == 0:
        zero = x.sum(dims) * 0.0
        return n, zero, zero
    mean = (w * x).sum(dims) / n
    var = (w * (x - channels(mean, x)) ** 2).sum(dims) / n
    return n, mean, var


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    running: RunningStatistics | None = None,
) -> Tensor:
    """Training-mode batch normalisation of the whole batch; updates `running`. arXiv:1502.03167,
    algorithm 1.
    """
    n, mean, var = moments(x, mask)
    xhat = standardised(x, n, mean, var, eps)
    if running is not None:
        _update(running, n, mean.detach(), var.detach(), momentum)
    return affine(xhat, weight, bias)


def batch_renorm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    running: RunningStatistics,
    r_max: float,
    d_max: float,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    momentum: float | None = 0.01,
    running_average: str = "std",
) -> Tensor:
    """Training-mode batch renormalisation of the whole batch; updates `running`. arXiv:1702.03275,
    algorithm 1.
    """
    n, mean, var = moments(x, mask)
    sigma = (running.var + eps).sqrt()
    sigma_b = (var + eps).sqrt()
    if n == 0:  # r = 1 and d = 0
        return affine(x.double() * 0.0, weight, bias)
    r = (sigma_b.detach() / sigma).clip(1 / r_max, r_max)
    d = ((mean.detach() - running.mean) / sigma).clip(-d_max, d_max)
    xhat = standardised(x, n, mean, var, eps) * channels(r, x) + channels(d, x)
    before = running.var
    _update(running, n, mean.detach(), var.detach(), momentum)
    if running_average == "std" and n > 1:
        factor = 1.0 / running.num_batches_tracked if momentum is None else momentum
        sigma = (before + eps).sqrt()
        sigma = sigma + factor * (sigma_b.detach() - sigma)
        running.var = (sigma**2 - eps).clip(min=0.0)
    return affine(xhat, weight, bias)


class LaggedBatchNorm:
    """`sync="lagged"` in one process: normalisation by averages of the statistics of earlier
    batches.

        y = (x - m) / sqrt(v + eps) * weight + bias
        dx = weight / sqrt(v + eps) * (g - w (a + xhat b)),   xhat = (x - m) / sqrt(v + eps)

    m, v: average of the batch moments up to the last step; a, b: average of mean g and mean g xhat
    up to the last step. A step whose `waits` is set (the first two, and any after a drift) uses its
    own batch instead, as batch norm does. Call `step` once between steps; until then nothing moves.
    """

    backward_rate: float
    eps: float
    forward_rate: float
    max_drift: float
    running: RunningStatistics
    waits: bool

    def __init__(
        self, channels: int, forward_rate: float, backward_rate: float, max_drift: float, eps: float
    ) -> None:
        self.forward_rate, self.backward_rate, self.max_drift, self.eps = (
            forward_rate,
            backward_rate,
            max_drift,
            eps,
        )
        self.running = RunningStatistics.initial(channels)
        self.waits = True
        self.average: tuple[Tensor, Tensor] | None = None
        self.gradient: tuple[Tensor, Tensor] | None = None
        self._batch: tuple[Tensor, Tensor, Tensor] | None = None
        self._seen: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        x = x.double()
        n, mean, var = moments(x, mask)
        self._batch = (n, mean.detach(), var.detach())
        if not self.waits:
            assert self.average is not None
            mean, var = self.average
        xhat = (x - channels(mean, x)) / (channels(var, x) + self.eps).sqrt()
        if not self.waits:
            xhat = self._correct_gradient(xhat, weight, mask)
        y = affine(xhat, weight, bias)
        if y.requires_grad:
            y.register_hook(lambda g: self._see(g, xhat.detach(), n))
        return y

    def step(self, momentum: float = 0.1) -> None:
        """Let the averages and the running statistics follow the last batch."""
        assert self._batch is not None
        n, mean, var = self._batch
        if n > 0:
            _update(self.running, n, mean, var, momentum)
            m, v = self.average or (mean, var)
            distance = (mean - m).abs() / (v + self.eps).sqrt()
            ratio = ((var + self.eps) / (v + self.eps)).log().abs() / 2
            drift = torch.maximum(distance, ratio).max()
            self.waits = self.average is None or bool(drift > self.max_drift)
            self.average = (m + self.forward_rate * (mean - m), v + self.forward_rate * (var - v))
        if self._seen is not None and n > 0:
            rate = 1.0 if self.gradient is None else self.backward_rate
            a, b = self.gradient or self._seen
            self.gradient = (a + rate * (self._seen[0] - a), b + rate * (self._seen[1] - b))
        self._batch = self._seen = None

    def _correct_gradient(self, xhat: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
        """xhat itself, whose gradient is lessened by weight * w * (a + xhat b)."""
        assert self.gradient is not None
        a, b = (channels(t, xhat) for t in self.gradient)
        w = torch.ones_like(xhat) if mask is None else mask.double()
        lessening = channels(weight.detach().double(), xhat) * w * (a + xhat.detach() * b)
        through = xhat * 1.0
        through.register_hook(lambda g: g - lessening)
        return through

    def _see(self, g: Tensor, xhat: Tensor, n: Tensor) -> None:
        dims = [0, *range(2, g.ndim)]
        self._seen = (g.sum(dims) / n, (g * xhat).sum(dims) / n)


def batch_norm_inference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: RunningStatistics,
    eps: float = 1e-5,
) -> Tensor:
    """Normalisation by the running statistics."""
    xhat = (x.double() - channels(running.mean, x)) / (channels(running.var, x) + eps).sqrt()
    return affine(xhat, weight, bias)


def _update(
    running: RunningStatistics, n: Tensor, mean: Tensor, var: Tensor, momentum: float | None
) -> None:
    if n > 0:
        running.num_batches_tracked += 1
        factor = 1.0 / running.num_batches_tracked if momentum is None else momentum
        running.mean = running.mean + factor * (mean - running.mean)
        if n > 1:
            running.var = running.var + factor * (var * n / (n - 1) - running.var)


def standardised(x: Tensor, n: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps); 0 in a channel where a single value counts, which says nothing
    about scale. Its mean w x / w may be rounded.
    """
    xhat = (x.double() - channels(mean, x)) / (channels(var, x) + eps).sqrt()
    is_single = (n <= 1) & (var.sqrt() <= 1e-14 * mean.abs())
    return torch.where(channels(is_single, x), 0.0, xhat)


def affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = xhat
    if weight is not None:
        y = y * channels(weight.double(), y)
    if bias is not None:
        y = y + channels(bias.double(), y)
    return y


def channels(t: Tensor, x: Tensor) -> Tensor:
    return t.view(1, -1, *[1] * (x.ndim - 2))
