"""Evaluation forwards by the statistics of the batch, or by a mix of them and the running ones.

    mean = a running_mean + (1 - a) mean_batch        var = a running_var + (1 - a) var_batch
    y = (x - mean) / sqrt(var + eps) * weight + bias

a is the weight of the source, whose running statistics these are: 1 is evaluation as ever, 0 that
of a training forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm import faults, inference, ops, tracing
from syncnorm.comm import debug, exchange, groups
from syncnorm.device import is_host
from syncnorm.errors import InputError
from syncnorm.family.layer import FamilyLayer
from syncnorm.family.passes import affine
from syncnorm.family.pooled import moments_of_sums
from syncnorm.ops import LocalSums
from syncnorm.statistics import repeated


@dataclass(frozen=True)
class Mix:
    """A mix of running and batch statistics, as in alpha-BN.

    Args:
        source: weight of the running statistics, in [0, 1]; the paper's alpha.

    References:
        You, Li and Zhao, Test-time Batch Statistics Calibration, arXiv:2110.04065. Deviation: the
        variance of the batch is the biased one, which normalises in training. Some published code
        gives alpha to the batch.
    """

    source: float

    def __post_init__(self) -> None:
        if not 0 <= self.source <= 1:
            raise InputError(
                f"`source` must be in [0, 1], got {self.source}. It is the weight of the running "
                "statistics."
            )


@dataclass(frozen=True)
class Prior:
    """Running statistics that count as much as so many samples: a = N / (N + n).

    n is the number of samples of the batch on all workers.

    Args:
        samples: N, >= 0.

    References:
        Schneider et al., Improving robustness against common corruptions by covariate shift
        adaptation, arXiv:2006.16971, section 2. Deviation: the biased variance, as for `Mix`.
    """

    samples: float

    def __post_init__(self) -> None:
        if not 0 <= self.samples < float("inf"):
            raise InputError(
                f"`samples` must be finite and >= 0, got {self.samples}. The running statistics "
                "count as much as so many samples."
            )


Choice = str | Mix | Prior
"""What evaluation normalises by: "running", "batch", a `Mix` or a `Prior`."""


@dataclass(frozen=True)
class How:
    """A choice of statistics, and the workers that share a batch."""

    statistics: Choice
    group: groups.Group | None

    def evaluate(self, layer: _BatchNorm, x: Tensor, mask: Tensor | None, name: str) -> Tensor:
        """The evaluation forward of a layer."""
        if self.statistics == "running" or tracing.tracer_of(x) == tracing.FAKE:
            kept = layer.running_mean, layer.running_var
            return inference.evaluate(x, *kept, layer.weight, layer.bias, layer.eps)
        local = ops.local_sums(x, mask)
        if local.tracer is not None:
            raise InputError(
                f'`statistics` must be "running" under {local.tracer}, got {self.statistics!r} '
                f"for {name}: an exchange would be no part of it. Leave the block first."
            )
        mean, var, a = self._batch(layer, x, local, name)
        if a is not None:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            mean = _mixed(mean, layer.running_mean, a)
            var = _mixed(var, layer.running_var, a)
        scale = (var + layer.eps).rsqrt()
        scale = scale if layer.weight is None else scale * layer.weight.double()
        return affine(x, mean, scale, layer.bias)

    def _batch(
        self, layer: _BatchNorm, x: Tensor, local: LocalSums, name: str
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The batch's mean and variance, and the weight of the running statistics, (); None: 0."""
        samples = torch.full((1,), float(x.shape[0]), dtype=torch.float64, device=x.device)
        is_prior = isinstance(self.statistics, Prior)
        sent = torch.cat([samples, local.sums]) if is_prior else local.sums
        message = local._replace(sums=sent)
        total = repeated.same(layer, lambda: _pooled_sums(message, self.group, name))
        sums = total[is_prior:].view(1, -1)
        batch = moments_of_sums(x, [local.mask], sums, self.group, name)
        (mean,), (var,), (count,) = batch.mean, batch.var, batch.count
        if self.statistics == "batch":
            # A spread that is not known gives the bias.
            return mean, var.masked_fill((count <= 1) & (var == 0), torch.inf), None
        return mean, var, self._source_weight(count, total[0])

    def _source_weight(self, count: Tensor, samples: Tensor) -> Tensor:
        """The weight of the running statistics, (), float64: 1 where nothing counts."""
        a = torch.zeros_like(count)
        if isinstance(self.statistics, Mix):
            a = torch.full_like(count, self.statistics.source)
        elif isinstance(self.statistics, Prior):
            a = self.statistics.samples / (self.statistics.samples + samples)
        return torch.where(count > 0, a, 1.0)

    def evaluate_family(
        self, layer: FamilyLayer, x: Tensor, weights: tuple[Tensor | None, ...]
    ) -> Tensor:
        """The evaluation forward of a layer of the family, before weight and bias."""
        if self.statistics == "running" or tracing.tracer_of(x) == tracing.FAKE:
            return layer.evaluate(x)
        count, batch = layer.batch_statistics(x, self.group, *weights)  # pyright: ignore[reportCallIssue]
        samples = torch.full((), float(x.shape[0]), dtype=torch.float64, device=x.device)
        if isinstance(self.statistics, Prior):
            local = samples.view(1)
            (samples,) = repeated.same(
                layer, lambda: exchange.sum_(local, self.group, "sums", layer.label)
            )
        a = self._source_weight(count, samples)
        before = {f"running_{name}": layer.get_buffer(f"running_{name}") for name in batch}
        try:
            for name, value in batch.items():
                layer._buffers[f"running_{name}"] = _mixed(value, before[f"running_{name}"], a)
            return layer.evaluate(x)
        finally:
            layer._buffers.update(before)


def _mixed(batch: Tensor, running: Tensor, a: Tensor) -> Tensor:
    """a running + (1 - a) batch, float64. What has no weight may be NaN."""
    running = running.double()
    mixed = torch.where(a == 0, batch, torch.lerp(batch, running, a))
    return torch.where(a == 1, running, mixed)


def _pooled_sums(local: LocalSums, group: groups.Group | None, name: str) -> Tensor:
    """The local sums of all workers added up, float64. Raises and exchanges as `pooled_statistic`."""
    sums = exchange.sum_(ops.message_of(local), group, "moments", name)
    if not local.is_compiled and (debug.is_on or is_host(sums)):
        faults.check(sums, local.sums, local.given, group, name)
    return sums
