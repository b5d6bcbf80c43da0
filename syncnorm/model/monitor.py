"""Figures of the layers' last training forward, read on request.

A layer keeps references to its batch's sums and to the moments that it normalised by. The figures
are computed from them when they are read, for all channels of all layers at once; until then they
cost nothing.

Shapes: L layers have T channels together, a layer has C. "By channel" is (..., T), "by layer" is
(..., L).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm import tracing
from syncnorm.comm import exchange, groups
from syncnorm.device import layer_device
from syncnorm.layers import SyncBatchRenorm
from syncnorm.maths.moments import Moments, Raw, reciprocal
from syncnorm.maths.precision import for_sums, sum_dtype
from syncnorm.module import Seen, SyncNorm
from syncnorm.statistics.flat import zeros

Figures = dict[str, float | None]
_NAMES = ("count", "between_share", "mean_gap", "var_gap", "r_clipped", "d_clipped")


def monitor(model: nn.Module) -> Monitor:
    """Watch the normalisation layers of `model` and the exchanges of this process, from now on.

    Training costs nothing more until `read` is called, and the monitor ends with the last reference
    to it.

    Args:
        model: the model, also one wrapped by DistributedDataParallel; layers are named as in what
            was wrapped.

    Returns:
        The monitor; see `Monitor.read`.

    Example:
        >>> from syncnorm import SyncBatchNorm
        >>> model = torch.nn.Sequential(SyncBatchNorm(1))
        >>> watch = monitor(model)
        >>> _ = model(torch.tensor([[1.0], [3.0]]))
        >>> watch.read()["layers"]["0"]["count"]
        2.0
    """
    return Monitor(model)


class Monitor:
    """The reader that `monitor` returns."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._tally = exchange.Tally()

    @torch.no_grad()
    def read(self) -> dict[str, Any]:
        """Read each layer's last training forward, and the exchanges since the last reading.

            between_share = mean of (m2 - sum over workers of local m2) / (m2 + n * eps)
            mean_gap      = RMS  of (mean - running_mean) / sqrt(running_var + eps)
            var_gap       = RMS  of log((var + eps) / (running_var + eps)) / 2

        each over the channels of a layer.

        *Statistics*: `between_share` is of the batch of all workers, whatever the layer normalises
        by. The other figures are of what each worker normalised by (its own batch under "running"
        and "none", the average under "lagged"), taken over the workers; `count` under "lagged" is
        that of the batch of all workers. The gaps are from the running statistics before the batch
        for renormalisation, and after it for `SyncBatchNorm`, which does not keep the former. A
        layer that was called several times gives the last call (of several micro-batches or ghost
        batches the last one); those that `recalibrate` makes, and repetitions by checkpointing, do
        not count.

        *Collectives*: one all-reduce of 3C + 8 float64 numbers for each layer, all layers in one
        message (one for each process group, if they have several), in any mode. Every worker must
        call. It is not counted. All get the same numbers, but for the seconds, which are each
        worker's own. On CUDA the device is waited for once.

        Returns:
            Plain numbers, ready for JSON, None where there is none (before a layer's first training
            forward, of an empty batch, not finite):

            - "layers", by qualified name: "count" (values per channel in the statistic),
              "between_share", "mean_gap", "var_gap", "r_clipped" and "d_clipped" (share of channels
              where renormalisation's r or d is at its bound; 1 while the schedule makes it batch
              normalisation; None for batch normalisation).
            - "exchanges" of this process, by whatever model: "count", "numbers" (float64 sent),
              "seconds" that it was held up (on CUDA: time to enqueue), and the same three
              "by_kind".
        """
        layers = {name: m for name, m in self._model.named_modules() if isinstance(m, SyncNorm)}
        for layer in layers.values():
            layer.statistics.settle()
        totals = self._tally.take()
        # The monitor's own exchanges are no part of the training.
        totals.pop("monitor", None)
        return {"layers": _read(layers), "exchanges": _summary(totals)}


def _read(layers: dict[str, SyncNorm]) -> dict[str, Figures]:
    """The figures of each layer, by name; all None for fake tensors."""
    if any(tracing.is_fake(layer) for layer in layers.values()):
        return {name: dict.fromkeys(_NAMES) for name in layers}
    grouped = _by_group(layers)
    tables = [_figures(list(some.values()), group) for group, some in grouped]
    # (L, 6) of all groups together: one wait for the device.
    rows = torch.cat([t.to(tables[0].device) for t in tables]).tolist() if tables else []
    names = (name for _, some in grouped for name in some)
    figures = dict(zip(names, rows, strict=True))
    return {name: _applicable(layer, figures[name]) for name, layer in layers.items()}


def _summary(totals: dict[str, exchange.Total]) -> dict[str, Any]:
    total = exchange.Total()
    for each in totals.values():
        total.add(each.count, each.numbers, each.seconds)
    return {**asdict(total), "by_kind": {kind: asdict(each) for kind, each in totals.items()}}


def _by_group(layers: dict[str, SyncNorm]) -> list[tuple[groups.Group | None, dict[str, SyncNorm]]]:
    """The layers of each process group, in the same order on all its workers."""
    together: dict[tuple[int, ...], tuple[groups.Group | None, dict[str, SyncNorm]]] = {}
    for name, layer in layers.items():
        group = groups.statistics_group(layer.workers)
        together.setdefault(tuple(groups.ranks(group)), (group, {}))[1][name] = layer
    return list(together.values())


class _LastForward(NamedTuple):
    """One layer's last training forward."""

    sums: Tensor
    """Local sums, (2C + 1,)."""
    batch: Moments
    """The moments that it normalised by: mean (C,), m2 (C,), count ()."""
    running_mean: Tensor
    """The reference of d, (C,)."""
    running_var: Tensor
    """The reference of r, (C,)."""
    r_max: Tensor
    """Scalar, like d_max."""
    d_max: Tensor

    @classmethod
    def of(cls, layer: SyncNorm, unbounded: Tensor) -> _LastForward:
        # A layer without a training forward counts as one with an empty batch.
        sums, batch, correction = layer.seen or _nothing(layer)
        if correction is not None:
            return cls(sums, batch, *correction[2:])
        mean, var = layer.running_mean, layer.running_var
        if mean is None or var is None:
            mean, var = batch.mean, batch.var
        return cls(sums, batch, mean, var, unbounded, unbounded)


def _nothing(layer: SyncNorm) -> Seen:
    sums = zeros(2 * layer.num_features + 1, layer_device(layer))
    return Seen(sums, Raw(sums), None)


class _Layout(NamedTuple):
    """The layout of the T channels of all L layers, one layer after the other."""

    channels: Tensor
    """Number of each layer's channels, (L,)."""
    owner: Tensor
    """The layer of each channel, (T,)."""
    places: Tensor
    """The channels of each layer, (L, max C), padded with 0."""
    is_own: Tensor
    """False where `places` is padded."""

    @classmethod
    @functools.lru_cache(maxsize=8)  # made on the host: to copy it would wait for the device
    def of(cls, sizes: tuple[int, ...], device: torch.device) -> _Layout:
        channels = torch.tensor(sizes, device="cpu")
        position = torch.arange(max(sizes), device="cpu")
        first, is_own = channels.cumsum(0) - channels, position < channels.unsqueeze(1)
        places = torch.where(is_own, first.unsqueeze(1) + position, 0)
        owner = torch.arange(len(sizes), device="cpu").repeat_interleave(channels)
        return cls(*(t.to(device) for t in (channels, owner, places, is_own)))

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the channels of each layer, (..., T) -> (..., L).

        Gathers into a padded (..., L, max C): a scatter-add on CUDA would not give the same bits on
        all workers.
        """
        return torch.where(self.is_own, values[..., self.places], 0.0).sum(-1)


@functools.lru_cache(maxsize=8)
def _constants(facts: tuple[tuple[float, ...], ...], device: torch.device) -> tuple[Tensor, ...]:
    """The columns of a table of numbers, in the type of sums."""
    return torch.tensor(facts, dtype=sum_dtype(device), device=device).unbind(1)


def _figures(layers: list[SyncNorm], group: groups.Group | None) -> Tensor:
    """The figures of each layer, (L, 6) in the order of _NAMES, from one exchange for all of them."""
    device = layer_device(layers[0])
    layout = _Layout.of(tuple(layer.num_features for layer in layers), device)
    facts = tuple(
        (layer.eps, float(not layer.sync_mode.normalizes_by_batch), float(layer.seen is not None))
        for layer in layers
    )
    eps, is_lagged, has_seen = _constants(facts, device)
    unbounded = torch.full((), math.inf, dtype=sum_dtype(device), device=device)
    # (3, T) and (8, L)
    by_channel, by_layer = _local_summands(
        [_LastForward.of(layer, unbounded) for layer in layers], has_seen, eps, layout
    )
    message = torch.cat([by_channel.flatten(), by_layer.flatten()])
    by_channel, by_layer = exchange.sum_(message, group, "monitor").split(
        [by_channel.numel(), by_layer.numel()]
    )
    return _pooled(by_channel.view(3, -1), by_layer.view(8, -1), eps, is_lagged > 0, layout)


def _local_summands(
    forwards: list[_LastForward], has_seen: Tensor, eps: Tensor, layout: _Layout
) -> tuple[Tensor, Tensor]:
    """This worker's summands: by channel (3, T), and by layer (8, L).

    By channel: sum wx, sum wx^2, local m2. By layer: sum w, 1 if there was a forward, the count of
    `batch`, the number of channels with known gaps, and the sums over channels of the four gaps.
    """
    device = eps.device
    sums, squares, n = (
        _flat(parts, device) for parts in zip(*(_split_sums(s.sums) for s in forwards), strict=True)
    )
    count = _flat([s.batch.count.view(1) for s in forwards], device)
    gaps = layout.sum(_gaps(forwards, count[layout.owner], eps[layout.owner], layout.owner))
    is_known = count > 0
    valid, *gaps = torch.where(is_known, torch.cat([layout.channels.unsqueeze(0), gaps]), 0.0)
    local_m2 = _m2(sums, squares, n[layout.owner])
    return torch.stack([sums, squares, local_m2]), torch.stack([n, has_seen, count, valid, *gaps])


def _pooled(
    by_channel: Tensor, by_layer: Tensor, eps: Tensor, is_lagged: Tensor, layout: _Layout
) -> Tensor:
    """The figures of each layer, (L, 6) in the order of _NAMES, from the sums over all workers."""
    sums, squares, within = by_channel
    n, workers, count, valid, *gaps = by_layer
    m2 = _m2(sums, squares, n[layout.owner])
    between = (m2 - within).clamp(min=0.0) / (m2 + (n * eps)[layout.owner])
    mean_square, var_square, r_clipped, d_clipped = (gap / valid for gap in gaps)
    # The average that a lagged layer normalises by has no count of its own. Without any forward
    # it is 0 / 0, which reads as None.
    count = torch.where(is_lagged, n * workers, count) / workers
    share = layout.sum(between) / layout.channels
    return torch.stack(
        [count, share, mean_square.sqrt(), var_square.sqrt(), r_clipped, d_clipped], 1
    )


def _flat(parts: Iterable[Tensor], device: torch.device) -> Tensor:
    """The layers' parts in one tensor, in the type of sums: L of (C,) -> (T,)."""
    return for_sums(torch.cat([part.to(device) for part in parts]))


def _split_sums(sums: Tensor) -> tuple[Tensor, ...]:
    """The raw sums as [sum wx (C), sum wx^2 (C), sum w (1)]."""
    channels = sums.numel() // 2
    return sums.split([channels, channels, 1])


def _m2(sums: Tensor, squares: Tensor, n: Tensor) -> Tensor:
    """Sum of squared deviations, all (T,): sum wx^2 - (sum wx)^2 / n."""
    return (squares - sums.square() * reciprocal(n)).clamp(min=0.0)


def _gaps(forwards: list[_LastForward], count: Tensor, eps: Tensor, owner: Tensor) -> Tensor:
    """Four figures of each channel, (4, T): the squares of both gaps, and 1 where r or d is at its bound.

    Unclipped, d is the gap of the mean and log r that of the variance, in any layer.
    """
    device = eps.device
    mean, m2 = (
        _flat((s.batch.mean for s in forwards), device),
        _flat((s.batch.m2 for s in forwards), device),
    )
    running_mean = _flat((s.running_mean for s in forwards), device)
    sigma = torch.sqrt(_flat((s.running_var for s in forwards), device) + eps)
    r_max = torch.stack([s.r_max.to(device) for s in forwards])[owner]
    d_max = torch.stack([s.d_max.to(device) for s in forwards])[owner]
    r = torch.sqrt(m2 * reciprocal(count) + eps) / sigma
    d = (mean - running_mean) / sigma
    return torch.stack(
        [d.square(), r.log().square(), (r >= r_max) | (r <= 1.0 / r_max), d.abs() >= d_max]
    )


def _applicable(layer: SyncNorm, values: list[float]) -> Figures:
    """The figures by name; None where they do not apply to the layer, or are not finite."""
    inapplicable: set[str] = set()
    if layer.running_mean is None:
        inapplicable |= {"mean_gap", "var_gap"}
    if not isinstance(layer, SyncBatchRenorm):
        inapplicable |= {"r_clipped", "d_clipped"}
    named = zip(_NAMES, values, strict=True)
    return {name: v if math.isfinite(v) and name not in inapplicable else None for name, v in named}
