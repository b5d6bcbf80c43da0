"""Rules by which layers could normalise without waiting, compared with what `sync="lagged"` does.

    python -m benchmarks.lagged_rules DATA_FOLDER [--tries] [--seeds 3] [--regime sharded_labels]

4 workers in one process, each with 16 samples of every step and a statistic of its own: 4,096
samples of Fashion-MNIST, 4 epochs, SGD with momentum 0.9, a cosine schedule, the networks of
`benchmarks.small_nets`. Some rules by learning rate; with `--tries` the others at one rate.

Of a step M, V are the pooled moments and m, v worker k's own, all known to worker k one step later;
A, B are the pooled means of g and g xhat, and a, b its own. A bar is an average of earlier steps,
by a rate; L = log(V + eps), l = log(v + eps). What a rule puts in place of M, V, A and B:

    batch           M, V, A, B themselves, which are waited for
    lagged          M bar, V bar, A bar, B bar
    trend           M bar + (average change of M) / rate, L alike
    own change      M bar + (m - m bar), L bar + (l - l bar), A bar + (a - a bar), B alike
    regressed       M bar + s (m - m bar), L bar + s' (l - l bar): s is the coefficient, in [0, 1],
                    of the regression of M - M bar on m - m bar over the layer's channels
    residuals       A', B' that solve a - A' - u B' = D bar and b - u A' - q B' = E bar, where
                    u, q are the means of xhat and xhat^2 over the worker's own values, and
                    D = a - A - u B, E = b - u A - q B what is left of a worker's gradient

D and E have a mean of 0 over the workers, whatever A and B are. So with `residuals` the sum of all
workers' gradients has no part along a shift or a scale of the input, as under "batch": to the order
in which the workers' xhat are not quite standardised together. The second equation has a ridge.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import fashion, paired
from benchmarks.small_nets import convolutional, fully_connected
from syncnorm.placement import epoch_order
from syncnorm.train.data.regimes import grouped, sharded

WORKERS, BATCH, SAMPLES, EPOCHS, EPS = 4, 64, 4096, 4, 1e-5
# Of averages of squares and products, of running statistics, and of the ridge.
SLOW, MOMENTUM, RIDGE = 0.1, 0.1, 0.1
NEVER = math.inf
RATES = {"convolutional": (0.1, 0.5, 1.0), "fully_connected": (0.02, 0.1, 0.5)}
ONE_RATE = 0.5


class Rule(NamedTuple):
    """What a layer puts in place of the pooled moments and gradient means.

    Args:
        moments, gradient: a name of the module's docstring; "batch": the pooled ones.
        forward_rate, backward_rate: weights of the newest value in the averages.
        max_drift: distance of M, V from what stood in for them, in standard deviations, beyond
            which the next step is pooled.
        by_channel: True if only the channels beyond it are.
        max_loss: ratio of a step's loss to the average beyond which the next step is pooled.
        first_steps: how many steps are pooled whatever the drift.
    """

    moments: str = "lagged"
    gradient: str = "lagged"
    forward_rate: float = 0.3
    backward_rate: float = 0.1
    max_drift: float = 0.35
    by_channel: bool = False
    max_loss: float = NEVER
    first_steps: int = 2


BATCH_NORM, LAGGED = "batch", "lagged"
BY_RATE = {
    BATCH_NORM: Rule("batch", "batch"),
    "lagged, one step pooled at first": Rule(first_steps=1),
    LAGGED: Rule(),
    "lagged, guard at 0.1": Rule(max_drift=0.1),
    "regressed, residuals": Rule("regressed", "residuals"),
}
TRIES = {
    "lagged, batch's gradient": Rule("lagged", "batch"),
    "batch, lagged gradient": Rule("batch", "lagged"),
    "batch, residuals": Rule("batch", "residuals"),
    "lagged, the newest alone": Rule(forward_rate=1.0, backward_rate=1.0),
    "lagged, guard at 0.2": Rule(max_drift=0.2),
    "lagged, 20 steps pooled at first": Rule(first_steps=20),
    "lagged, guard by channel": Rule(by_channel=True),
    "lagged, guard on the loss": Rule(max_loss=1.3),
    "trend": Rule("trend"),
    "own change since the last step": Rule("own change", "own change", 1.0, 1.0, NEVER),
    "own change": Rule("own change", "own change", max_drift=NEVER),
    "regressed, lagged gradient": Rule("regressed", "lagged"),
    "regressed, own change": Rule("regressed", "own change"),
}
RULES = BY_RATE | TRIES


class Averages:
    """Averages of values by name; the first value is taken whole."""

    def __init__(self) -> None:
        self.of: dict[str, Tensor] = {}

    def follow(self, rate: float, **values: Tensor) -> None:
        for name, value in values.items():
            old = self.of.get(name, value)
            self.of[name] = old + rate * (value - old)

    def __getitem__(self, name: str) -> Tensor:
        return self.of[name]

    def __bool__(self) -> bool:
        return bool(self.of)

    def coefficient(self, name: str) -> Tensor | float:
        """Of a regression over the channels, for each worker, (K, 1); 1 before there is one."""
        if f"{name} product" not in self.of:
            return 1.0
        square = self.of[f"{name} square"].clamp(min=1e-30)
        return (self.of[f"{name} product"] / square).clamp(0.0, 1.0)

    def regress(self, name: str, target: Tensor, own: Tensor, scale: Tensor | float = 1.0) -> None:
        sums = {
            f"{name} product": (target * own * scale).sum(1, keepdim=True),
            f"{name} square": (own * own * scale).sum(1, keepdim=True),
        }
        self.follow(SLOW, **sums)


class Normalize(torch.autograd.Function):
    """(x - mean) * invstd for x (K, N, C, P) and statistics (K, C); the layer gives its gradient."""

    @staticmethod
    def forward(ctx, x, mean, invstd, layer):  # pyright: ignore[reportIncompatibleMethodOverride]
        xhat = (x - mean[:, None, :, None]) * invstd[:, None, :, None]
        ctx.save_for_backward(xhat, invstd)
        ctx.layer = layer
        return xhat

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        xhat, invstd = ctx.saved_tensors
        a, b = ctx.layer.gradient_means(g, xhat)
        grad = g - a[:, None, :, None] - xhat * b[:, None, :, None]
        return grad * invstd[:, None, :, None], None, None, None


class Layer(nn.Module):
    """A layer of all workers, whose statistics go by a rule."""

    def __init__(self, channels: int, rule: Rule) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.rule = rule
        self.running = torch.zeros(channels), torch.ones(channels)
        self.forward_averages, self.backward_averages = Averages(), Averages()
        self.waits = torch.ones(channels, dtype=torch.bool)
        self.waited: list[float] = []
        self.is_told_to_wait = False

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        if self.training:
            parts = x.reshape(WORKERS, -1, x.shape[1], math.prod(x.shape[2:]))
            mean, var = self.moments(parts.detach())
            xhat = Normalize.apply(parts, mean, (var + EPS).rsqrt(), self).view(x.shape)
        else:
            mean, var = (each.view(shape) for each in self.running)
            xhat = (x - mean) / (var + EPS).sqrt()
        return xhat * self.weight.view(shape) + self.bias.view(shape)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What this step is normalised by, (K, C) each; the averages move on at once."""
        v, m = torch.var_mean(x.double(), (1, 3), correction=0)
        M = m.mean(0)
        V = (v + m * m).mean(0) - M * M
        self.now = self.waits.clone() | self.is_told_to_wait
        waits = self.rule.moments == "batch" or self.now.double().mean().item()
        self.waited.append(float(waits))
        used = self._in_place_of(M, V, m, v)
        mean, var = (torch.where(self.now, p, u) for p, u in zip((M, V), used, strict=True))
        self._follow_moments(M, V, m, v, used)
        return mean.float(), var.float()

    def _in_place_of(self, M: Tensor, V: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        kind, past = self.rule.moments, self.forward_averages
        if kind == "batch" or not past:
            return M.expand_as(m), V.expand_as(v)
        if kind == "lagged":
            return past["M"].expand_as(m), past["V"].expand_as(v)
        if kind == "trend":
            ahead = 1 / self.rule.forward_rate
            mean, log = past["M"] + ahead * past["dM"], past["L"] + ahead * past["dL"]
        else:
            s, t = (past.coefficient("M"), past.coefficient("L")) if kind == "regressed" else (1, 1)
            mean = past["M"] + s * (m - past["m"])
            log = past["L"] + t * ((v + EPS).log() - past["l"])
        return mean.expand_as(m), (log.exp() - EPS).clamp(min=0).expand_as(v)

    def _follow_moments(
        self, M: Tensor, V: Tensor, m: Tensor, v: Tensor, used: tuple[Tensor, Tensor]
    ) -> None:
        past, rate, (mean, var) = self.forward_averages, self.rule.forward_rate, used
        L, own = (V + EPS).log(), (v + EPS).log()
        for old, new in zip(self.running, (M, V), strict=True):
            old += MOMENTUM * (new - old)
        drift = ((M - mean).abs() / (var + EPS).sqrt()).maximum((L - (var + EPS).log()).abs() / 2)
        beyond = drift.amax(0) > self.rule.max_drift
        self.waits = beyond if self.rule.by_channel else beyond.any().expand_as(beyond)
        self.waits = self.waits | (len(self.waited) < self.rule.first_steps)
        if past:
            past.regress("M", M - past["M"], m - past["m"], 1 / (V + EPS))
            past.regress("L", L - past["L"], own - past["l"])
            past.follow(SLOW, dM=M - past["last M"], dL=L - past["last L"])
        else:
            past.follow(SLOW, dM=torch.zeros_like(M), dL=torch.zeros_like(L))
        past.follow(rate, M=M, V=V, L=L, m=m, l=own)
        past.follow(1.0, **{"last M": M, "last L": L})

    def gradient_means(self, g: Tensor, xhat: Tensor) -> tuple[Tensor, Tensor]:
        """What the gradient is corrected by, (K, C) each; the averages move on at once."""
        a, b, u, q = (each.double().mean((1, 3)) for each in (g, g * xhat, xhat, xhat * xhat))
        A, B = a.mean(0), b.mean(0)
        kind, past, rate = self.rule.gradient, self.backward_averages, self.rule.backward_rate
        if kind == "batch" or not past:
            used = A, B
        elif kind == "lagged":
            used = past["A"], past["B"]
        elif kind == "own change":
            used = past["A"] + a - past["a"], past["B"] + b - past["b"]
        else:
            left = a - past["D"]
            second = b - past["E"] - u * left + RIDGE * past["B"]
            slope = second / (q - u * u + RIDGE)
            used = left - u * slope, slope
        past.follow(rate, A=A, B=B, a=a, b=b, D=a - A - u * B, E=b - u * A - q * B)
        pairs = zip((A, B), used, strict=True)
        first, second = (torch.where(self.now, p, each.expand_as(a)).float() for p, each in pairs)
        return first, second


class Outcome(NamedTuple):
    accuracy: float
    """On the test set, in %."""
    waited: float
    """Share of layer-steps, or channel-steps, whose moments were waited for, in %."""


def train(network: str, rule: Rule, rate: float, regime: str, seed: int, data: Data) -> Outcome:
    """Train on all workers' batches in this process, to the end of the schedule."""
    torch.manual_seed(seed)
    make = {"convolutional": convolutional, "fully_connected": fully_connected}[network]
    model = make(1, fashion.CLASSES, lambda channels: Layer(channels, rule))
    layers = [each for each in model.modules() if isinstance(each, Layer)]
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    steps = EPOCHS * SAMPLES // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    usual = math.inf
    for epoch in range(EPOCHS):
        order = order_of(regime, data[1], seed, epoch)
        for index in order.split(BATCH):
            loss = F.cross_entropy(model(data[0][index]), data[1][index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            for layer in layers:
                layer.is_told_to_wait = loss.item() > rule.max_loss * usual
            usual = loss.item() if usual == math.inf else usual + SLOW * (loss.item() - usual)
    right = fashion.correct(model, data[2], data[3])
    waited = statistics.mean(share for layer in layers for share in layer.waited)
    return Outcome(100 * right / len(data[3]), 100 * waited)


Data = tuple[Tensor, Tensor, Tensor, Tensor]


def order_of(regime: str, labels: Tensor, seed: int, epoch: int) -> Tensor:
    """The samples of an epoch, each step's in the order of its workers."""
    order = epoch_order(len(labels), seed, epoch)
    if regime == "sharded_labels":
        return sharded(order, labels, BATCH, WORKERS)
    return order if regime == "iid" else grouped(order, labels, BATCH // WORKERS, 2)


def main() -> None:
    paired.fix_allocator()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", metavar="DATA_FOLDER", type=Path)
    parser.add_argument("--tries", action="store_true", help="the others, at one learning rate")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument(
        "--regime", default="sharded_labels", choices=["iid", "label_groups", "sharded_labels"]
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    images, labels, test_images, test_labels = fashion.load(given.root)
    kept = epoch_order(len(labels), 0, 0)[:SAMPLES]
    data = images[kept], labels[kept], test_images, test_labels
    print("| network | learning rate | rule | accuracy | each seed | waited |")
    print("|---|---|---|---|---|---|", flush=True)
    for network in given.networks:
        for rate in (ONE_RATE,) if given.tries else RATES[network]:
            for name in TRIES if given.tries else BY_RATE:
                found = [
                    train(network, RULES[name], rate, given.regime, seed, data)
                    for seed in range(given.seeds)
                ]
                each = ", ".join(f"{outcome.accuracy:.1f}" for outcome in found)
                mean = statistics.mean(outcome.accuracy for outcome in found)
                waited = statistics.mean(outcome.waited for outcome in found)
                print(
                    f"| {network} | {rate} | {name} | {mean:.1f} | {each} | {waited:.0f} % |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
