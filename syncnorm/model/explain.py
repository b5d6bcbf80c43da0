"""A table of a model's normalisation layers and of what converting makes of them, before training.

Nothing is changed and nothing exchanged: one worker may call alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from syncnorm import tracing
from syncnorm.comm import exchange, groups
from syncnorm.errors import InputError
from syncnorm.family.layer import Pooling
from syncnorm.layers import SyncBatchNorm, SyncBatchRenorm
from syncnorm.model.convert.class_swap import Request
from syncnorm.model.convert.others import is_home_made, kind_of, stays_local
from syncnorm.model.convert.refuse import reason
from syncnorm.model.ddp import largest_message, replaced
from syncnorm.model.lints import decay_lints, model_lints, recorded_calls, sampler_lints
from syncnorm.model.sample import Shape, record_shapes, uncompiled
from syncnorm.module import SyncNorm
from syncnorm.statistics import mode_of
from syncnorm.statistics.batch import BatchMode
from syncnorm.statistics.source import Mode

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, Pooling)
# Below 8 values sigma_B is over 10 % too small on average. With 4 samples per statistic ImageNet
# loses 4 points against 32, of which renormalisation wins back 2 (Ioffe 2017, section 4.2).
_FEW_VALUES, _FEW_SAMPLES = 8, 4


@dataclass(frozen=True)
class Row:
    """One layer. None where something does not apply, or is not known without a sample."""

    layer: str
    now: str
    """Its class."""
    convert: str
    """The class that `convert(model)` makes of it. The columns that follow are of that layer."""
    sync: str | None = None
    workers: int | None = None
    """Number that share a statistic; the fewest, where groups differ."""
    samples: int | None = None
    """Per statistic, over these workers, each having a batch like the sample."""
    values: int | None = None
    """Per channel and statistic: samples times positions, the fewest of several calls."""
    messages: int | None = None
    """Exchanges of this layer alone in a training step, forward and backward.

    They are waited for at once, but for those that a method of the family has no hurry for.
    """
    bytes: int | None = None
    """Sent by one worker in these, and in the messages that the layer shares with others."""
    clock: int | None = None
    """The clock of the renormalisation schedule: updates of the statistics so far."""
    r_max: float | None = None
    d_max: float | None = None
    between: float | None = None
    """Share of the variance that lies between workers, by `monitor`."""
    advice: str = ""


@dataclass(frozen=True)
class Explanation:
    """The result of `explain`; its text is a table."""

    rows: list[Row]
    """One for each normalisation layer."""
    lints: list[str]
    """Likely mistakes in the model or the loader."""
    messages: int
    """Exchanges of the whole model in a training step, including those off the critical path."""
    bytes: int
    is_alone: bool = False
    """True if the figures are for one worker because there is no other."""

    def __str__(self) -> str:
        if not self.rows:
            return "no normalisation layer"
        names = [
            f.name
            for f in fields(Row)
            if any(getattr(row, f.name) not in (None, "") for row in self.rows)
        ]
        cells = [names, *([_text(getattr(row, name)) for name in names] for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]
        total = f"a training step: {self.messages} message(s), {self.bytes} bytes from each worker"
        total += ", for 1 worker; for 8: explain(..., world_size=8)" if self.is_alone else ""
        return "\n".join([*lines, total, *(f"! {lint}" for lint in self.lints)])


def explain(
    model: nn.Module,
    sample: Any = None,
    world_size: int | None = None,
    *,
    readings: Mapping[str, Mapping[str, float | None]] | None = None,
    loader: DataLoader[Any] | None = None,
    optimizer: Optimizer | None = None,
) -> Explanation:
    """Describe each normalisation layer: conversion, pooling, traffic and values per statistic.

        values per statistic = N * prod(S) * workers that share it

    The model stays as it is: the sample passes once in evaluation mode without gradients; modes,
    buffers and random numbers are put back. (Forward hooks of the model's own run.) Where dropout
    comes before a batch norm it passes twice more, for the variances with dropout and without.

    Messages and bytes are those after `prepare_ddp` of this model alone, which gives the messages
    of a process group one size.

    *Collectives*: none, whatever the layers; one worker may call alone.

    Args:
        model: any, also one wrapped by DistributedDataParallel.
        sample: one worker's batch: a tensor, a mapping (keyword arguments), or a tuple or list that
            begins with what the model requires (its first element, where that is one argument).
            Without it there are no counts, and the order of layers is not known.
        world_size: the number of workers to assume; None: those that there are.
        readings: `monitor(model).read()["layers"]`, for the share of the variance that lies between
            workers.
        loader: of the training data; its sampler is inspected, not iterated.
        optimizer: of the training, for the effective learning rates of weights that decay directly
            before a batch norm; needs a sample.

    Returns:
        The rows, lints and totals; print it.

    Raises:
        InputError: `world_size` is below 1, the model does not take the sample's arguments, or it
            has lazy parameters and a sample was given.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
        >>> print(explain(model, torch.zeros(2, 3, 4, 4), world_size=4))
        layer  now          convert        sync   workers  samples  values  messages  bytes
        1      BatchNorm2d  SyncBatchNorm  batch  4        8        32      2         288
        a training step: 2 message(s), 288 bytes from each worker

    References:
        Li et al., Understanding the Disharmony between Dropout and Batch Normalization by Variance
        Shift, arXiv:1801.05134, for the lint about dropout.
    """
    if world_size is not None and world_size < 1:
        raise InputError(f"`world_size` must be at least 1, got {world_size}. It counts workers.")
    model = model.module if isinstance(model, DistributedDataParallel) else model
    layers = {
        name: m for name, m in model.named_modules() if isinstance(m, _NORMS) or is_home_made(m)
    }
    seen, lints = None, []
    if sample is not None:
        with uncompiled():
            with recorded_calls(model) as calls:
                seen = record_shapes(model, sample)
            lints += model_lints(model, calls, sample)
        if optimizer is not None:
            lints += decay_lints(model, calls, optimizer)
    trained = {name: m for name, m in layers.items() if m.training or not model.training}
    local = stays_local({name: m for name, m in trained.items() if is_home_made(m)})
    lints += [said for said in (replaced(model), local) if said is not None]
    if loader is not None:
        lints += sampler_lints(loader)
    world = world_size or len(groups.ranks(groups.existing_group(None)))
    is_alone = world_size is None and world == 1
    rows, parts = [], {}
    for number, (name, layer) in enumerate(layers.items()):
        shapes = None if seen is None else [shape for module, shape in seen if module is layer]
        part, row, faults = _explain(
            name, layer, shapes, model.training and not layer.training, world, is_alone
        )
        rows.append(replace(row, between=(readings or {}).get(name, {}).get("between_share")))
        if part is not None:
            parts[number] = part
        lints += faults
    least = _least_sizes(parts.values())
    for number, part in parts.items():
        messages, numbers = _traffic(part, least.get(part.cut, 0))
        rows[number] = replace(rows[number], messages=messages, bytes=8 * numbers)
    return Explanation(rows, lints, *_totals(list(parts.values()), least), is_alone and bool(parts))


class _Part(NamedTuple):
    """The part of a layer in the messages of a step."""

    mode: Mode
    cut: tuple[tuple[int, ...], ...]
    """The workers that pool together: layers of one cut share a process group."""
    workers: int
    """Number that take part."""
    channels: int
    own: list[int]
    """Numbers in each message that the layer sends alone."""
    room: int
    """The least size that it gives the messages of its group."""


def _explain(
    name: str,
    layer: nn.Module,
    shapes: list[Shape] | None,
    is_frozen: bool,
    world: int,
    is_alone: bool,
) -> tuple[_Part | None, Row, list[str]]:
    """The layer's part in the messages, its row, and its lints."""
    row = Row(name, _class_name(layer), _becomes(layer))
    if not isinstance(layer, _BatchNorm | Pooling) or row.convert.startswith("refused"):
        return None, row, []
    if is_frozen:
        return None, replace(row, advice="frozen: in evaluation mode while the model trains"), []
    mode, kept = BatchMode(), None
    if isinstance(layer, SyncNorm):
        mode, kept = layer.sync_mode, layer.workers
    elif isinstance(layer, Pooling):
        mode, kept = mode_of(layer.sync), layer.workers
    row = replace(row, sync=mode.name)
    try:
        cut = groups.cut(kept, world) if mode.is_pooled else ((0,),)
    except InputError as error:
        return None, row, [f"{name or 'the layer'}: {error}"]
    group = None if cut is None else min(map(len, cut))
    workers = group if mode.normalizes_pooled else 1
    row = replace(row, workers=workers, **_schedule(layer))
    if shapes and workers is not None:
        # An empty call may be due to this sample alone, so calls with values come first.
        least = min(
            shapes, key=lambda shape: (math.prod(shape) == 0, shape[0] * math.prod(shape[2:]))
        )
        row = replace(
            row, samples=least[0] * workers, values=least[0] * workers * math.prod(least[2:])
        )
        if isinstance(layer, _BatchNorm):
            may_pool = workers < world or is_alone
            row = replace(row, advice=_advice(row, isinstance(layer, SyncBatchRenorm), may_pool))
    channels, calls = layer.num_features, 1 if shapes is None else len(shapes)
    if cut is None or group is None or not channels:
        return None, row, []
    own = layer.message_sizes() if isinstance(layer, Pooling) else mode.own_sizes(channels)
    room = exchange.size_of(largest_message(layer))
    return _Part(mode, cut, group, channels, own * calls, room), row, []


def _class_name(layer: nn.Module) -> str:
    # One of ours has the same name.
    return "torch.nn.SyncBatchNorm" if type(layer) is nn.SyncBatchNorm else kind_of(layer)


def _becomes(layer: nn.Module) -> str:
    if isinstance(layer, SyncNorm) or not isinstance(layer, _BatchNorm):
        return "unchanged"
    why = reason(layer, Request(SyncBatchNorm))
    return "SyncBatchNorm" if why is None else f"refused: {why}"


def _schedule(layer: nn.Module) -> dict[str, Any]:
    if (
        not isinstance(layer, SyncBatchRenorm)
        or layer.num_batches_tracked is None
        or tracing.is_fake(layer)
    ):
        return {}
    r_max, d_max = layer.bounds()
    return {"clock": int(layer.num_batches_tracked), "r_max": r_max.item(), "d_max": d_max.item()}


def _least_sizes(parts: Iterable[_Part]) -> dict[Any, int]:
    """The least message size of each group: as in `prepare_ddp`, that of its widest layer."""
    least: dict[Any, int] = {}
    for part in parts:
        if part.mode.is_pooled:
            least[part.cut] = max(least.get(part.cut, 0), part.room)
    return least


def _traffic(part: _Part, room: int) -> tuple[int, int]:
    """A layer's own exchanges in a step, and its numbers in these and in shared ones."""
    if part.workers == 1:
        return 0, 0
    own = [exchange.size_of(size, room) for size in part.own]
    return len(own), sum(own) + sum(part.mode.flat_sizes([part.channels], 0))


def _totals(parts: list[_Part], least: Mapping[Any, int]) -> tuple[int, int]:
    """Messages and bytes of the model in a step, of single layers and shared ones."""
    sizes: list[int] = []
    together: dict[tuple[str, Any, int], list[_Part]] = {}
    for part in parts:
        if part.workers > 1:
            sizes += [exchange.size_of(size, least[part.cut]) for size in part.own]
            together.setdefault((part.mode.name, part.cut, part.workers), []).append(part)
    for (_, cut, workers), some in together.items():
        flat = some[0].mode.flat_sizes([part.channels for part in some], workers)
        sizes += [exchange.size_of(size, least[cut]) for size in flat]
    return len(sizes), 8 * sum(sizes)


def _advice(row: Row, is_renorm: bool, may_pool: bool) -> str:
    assert row.values is not None
    assert row.samples is not None
    if row.values == 0:
        return "the sample holds nothing here"
    if row.values >= _FEW_VALUES and row.samples > _FEW_SAMPLES:
        return ""
    found = f"{row.samples} sample(s) per statistic"
    if row.values < _FEW_VALUES:
        ratio = mean_ratio(row.values)
        found = f"{row.values} value(s) per statistic, sigma_B is {ratio:.2f} sigma on average"
    remedies = ["pool over more workers"] if may_pool else []
    remedies += ["larger batches"] if is_renorm else ["SyncBatchRenorm"]
    return f"{found}: {' or '.join(remedies)}"


def mean_ratio(values: int) -> float:
    """E[sigma_B] / sigma of so many independent normal values, sigma_B from the biased variance.

        sqrt(2 / m) Gamma(m / 2) / Gamma((m - 1) / 2)

    >>> [round(mean_ratio(m), 2) for m in (1, 2, 4, 8, 32)]
    [0.0, 0.56, 0.8, 0.9, 0.98]
    """
    if values < 2:
        return 0.0
    return math.sqrt(2 / values) * math.exp(math.lgamma(values / 2) - math.lgamma((values - 1) / 2))


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
