"""Evaluation by the statistics of what is evaluated, or by a mix of them and the running ones.

    mean = a running_mean + (1 - a) mean_batch        var = a running_var + (1 - a) var_batch
    y = (x - mean) / sqrt(var + eps) * weight + bias

a is the weight of the source, whose running statistics these are: 1 is evaluation as ever, 0 that
of a training forward.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm import functional, observed, ops
from syncnorm.comm import groups
from syncnorm.errors import InputError
from syncnorm.family.layer import Pooling
from syncnorm.family.pooled import channels, moments_of_sums, widened
from syncnorm.model.convert.others import has_own_forward
from syncnorm.module import SyncNorm
from syncnorm.ops import LocalSums, Statistic
from syncnorm.statistics.source import Source
from syncnorm.undocumented import disable_dynamo


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


@contextmanager
def evaluation_statistics(
    model: nn.Module, statistics: Choice = "batch", *, process_group: groups.Spec = None
) -> Iterator[None]:
    """Choose the statistics of evaluation forwards within the block.

        mean = a running_mean + (1 - a) mean_batch        var = a running_var + (1 - a) var_batch

    For data that differ from the training's: a = 1 for "running", 0 for "batch" (as in training),
    between them for `Mix` and `Prior`. All batch normalisations of the model are meant, ours,
    whatever their `sync`, and torch's; dropout and the like stay as in evaluation.

    *Statistics*: the batch's are those of a training forward: over all workers of `process_group`,
    weighted by a mask where there is one, variance biased. What is kept stays as it is. Where
    nothing counts, a is 1; "batch" gives the bias there and for a single value, as training does.

    *Collectives*: for each forward of a layer one all-reduce of 2C+1 numbers, 2C+2 with `Prior`,
    none with "running"; in grad mode one of 2C in the backward pass. Every worker must call as
    often, with samples or without. `process_group=1` keeps each worker's batch its own.

    *Gradients*: through the batch's statistics, times 1 - a; of weight and bias local sums, as in
    training. Of any order.

    Args:
        model: in evaluation mode, also one wrapped by DistributedDataParallel.
        statistics: "running", "batch", `Mix(source)` or `Prior(samples)`.
        process_group: the workers that share an inference batch; None: all. See `syncnorm.groups`.

    Raises:
        InputError: an argument breaks its rule; a layer has no running statistics to mix in, or
            evaluates by code of its own; or, before any exchange, a layer is called in training
            mode.

    Example:
        >>> from syncnorm import SyncBatchNorm
        >>> layer, x = SyncBatchNorm(1, eps=1e-12).eval(), torch.tensor([[1.0], [3.0]])
        >>> with evaluation_statistics(layer, "batch"):
        ...     layer(x).tolist()
        [[-1.0], [1.0]]

    References:
        Nado et al., Evaluating prediction-time batch normalization, arXiv:2006.10963, for "batch".
    """
    if not isinstance(statistics, Mix | Prior) and statistics not in ("running", "batch"):
        raise InputError(
            '`statistics` must be "running", "batch", a Mix or a Prior, got '
            f'{statistics!r}. The default is "batch".'
        )
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    _check(model, layers, statistics)
    how = _How(statistics, groups.statistics_group(process_group))
    before = {m: m.statistics for m in layers.values() if isinstance(m, SyncNorm)}
    theirs = {name: m for name, m in layers.items() if m not in before}
    patches = {m: vars(m).get("forward") for m in theirs.values()}
    for layer, source in before.items():
        layer.statistics = _Lent(source, how)
    for name, layer in theirs.items():
        layer.forward = _Theirs(layer, name, how)
    try:
        yield
    finally:
        for layer, source in before.items():
            layer.statistics = source
        for layer, patch in patches.items():
            del layer.forward
            if patch is not None:
                layer.forward = patch


def _check(model: nn.Module, layers: dict[str, _BatchNorm], statistics: Choice) -> None:
    def is_own(layer: nn.Module) -> bool:
        is_patched = isinstance(vars(layer).get("forward"), _Theirs)  # by a block around this one
        return not isinstance(layer, SyncNorm) and has_own_forward(layer) and not is_patched

    own = [name for name, layer in layers.items() if is_own(layer)]
    own += [name for name, m in model.named_modules() if isinstance(m, Pooling)]
    if own and statistics != "running":
        raise InputError(
            f"`model` must have batch norms of syncnorm's or torch's own forward, got {own}, which "
            "evaluate in ways of their own. convert(model) makes them layers of ours where it can."
        )
    bare = [name for name, layer in layers.items() if layer.running_mean is None]
    if bare and isinstance(statistics, Mix | Prior):
        raise InputError(
            f'`statistics` must be "batch" for layers without running statistics, got '
            f"{statistics} for {bare}."
        )


@dataclass(frozen=True)
class _How:
    """What is mixed, and over whom."""

    statistics: Choice
    group: groups.Group | None

    def evaluate(self, layer: _BatchNorm, x: Tensor, mask: Tensor | None, name: str) -> Tensor:
        """The evaluation forward of a layer."""
        if self.statistics == "running" or observed.observer(x) == observed.FAKE:
            return _by(layer, x, layer.running_mean, layer.running_var)
        local = ops.local_sums(x, mask)
        if local.observer is not None:
            raise observed.refuse(local.observer, name)
        mean, var, a = self._batch(x, local, name)
        if a is not None:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            mean = torch.lerp(mean, layer.running_mean.double(), a)
            var = torch.lerp(var, layer.running_var.double(), a)
        if not torch.is_grad_enabled():
            return _by(layer, x, mean, var)
        scale = (var + layer.eps).rsqrt()
        scale = scale if layer.weight is None else scale * layer.weight.double()
        wide = widened(x)
        y = (wide - channels(mean, wide)) * channels(scale, wide)
        y = y if layer.bias is None else y + channels(layer.bias, wide)
        return y.to(x.dtype)

    def _batch(
        self, x: Tensor, local: LocalSums, name: str
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The batch's mean and variance, and the weight of the running statistics, (); None: 0."""
        samples = torch.full((1,), float(x.shape[0]), dtype=torch.float64, device=x.device)
        is_prior = isinstance(self.statistics, Prior)
        message = torch.cat([samples, local.sums]) if is_prior else local.sums
        total = ops.pooled_sums(local._replace(sums=message), self.group, name)
        if torch.is_grad_enabled() and self.group is not None and not x.requires_grad:
            # Whether x needs a gradient may differ between workers; the exchange must not.
            x = x.detach().requires_grad_()
        sums = total[is_prior:].view(1, -1)
        batch = moments_of_sums(x, [local.mask], sums, self.group, name)
        (mean,), (var,), (count,) = batch.mean, batch.var, batch.count
        if isinstance(self.statistics, Mix):
            a = torch.full_like(count, self.statistics.source)
        elif isinstance(self.statistics, Prior):
            prior = self.statistics.samples
            a = prior / (prior + total[0])
        else:
            # A spread that is not known gives the bias.
            return mean, var.masked_fill((count <= 1) & (var == 0), torch.inf), None
        return mean, var, torch.where(count > 0, a, 1.0)


def _by(layer: _BatchNorm, x: Tensor, mean: Tensor | None, var: Tensor | None) -> Tensor:
    return functional.evaluate(x, mean, var, layer.weight, layer.bias, layer.eps)


class _Lent(Source):
    """A layer's own source, except that it evaluates as the block says.

    Args:
        source: the layer's own.
        how: the block's choice.
    """

    is_lent = True

    def __init__(self, source: Source, how: _How) -> None:
        self.source = source
        self.how = how

    @property
    def is_accumulating(self) -> bool:
        return self.source.is_accumulating

    @disable_dynamo
    def evaluate(self, layer: SyncNorm, x: Tensor, mask: Tensor | None) -> Tensor:
        self.settle()
        return self.how.evaluate(layer, x, mask, layer.label)

    @disable_dynamo
    def forward(self, layer: SyncNorm, x: Tensor, mask: Tensor | None) -> Tensor:
        raise _training(layer.label)

    def statistic(self, layer: SyncNorm, local: LocalSums) -> Statistic:
        raise _training(layer.label)

    def settle(self) -> None:
        self.source.settle()

    def discard(self, layer: SyncNorm) -> None:
        self.source.discard(layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        # A copy made within the block is not part of it.
        return copy.deepcopy(self.source, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        # Nor is what is loaded from a pickle.
        return _itself, (self.source,)


def _itself(source: Source) -> Source:
    return source


class _Theirs:
    """The forward of a batch norm of torch's within the block."""

    def __init__(self, layer: _BatchNorm, name: str, how: _How) -> None:
        self.layer, self.name, self.how = layer, name or type(layer).__name__, how

    @disable_dynamo
    def __call__(self, input: Tensor) -> Tensor:  # torch's name for the argument
        if self.layer.training:
            raise _training(self.name)
        functional.check_input(input, self.layer.num_features)
        return self.how.evaluate(self.layer, input, None, self.name)


def _training(name: str) -> InputError:
    return InputError(
        "`model` must be in evaluation mode within evaluation_statistics, got a training forward "
        f"of {name}. Call model.eval(), or train outside of the block."
    )
