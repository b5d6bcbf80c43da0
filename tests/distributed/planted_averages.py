"""Defects of methods with averages over steps, in the package of this process while a block lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from syncnorm.comm import exchange
from syncnorm.family.late_sums import keep
from syncnorm.family.mabn import MABN
from syncnorm.family.online import OnlineNorm
from syncnorm.family.power import PowerNorm
from syncnorm.family.surrogate_gradient import Call, mean_of
from syncnorm.family.unified import UnifiedNorm
from syncnorm.family.window import WindowNorm
from tests.distributed.planted_family import unpooled


@contextmanager
def gradients_unpooled() -> Iterator[None]:
    """What the backward pass sends comes back as it was sent."""
    true = exchange.start_sum

    def start_sum(message: Tensor, group: Any, kind: str, name: str = "") -> exchange.Pending:
        pending = true(message, group, kind, name)
        return exchange.Pending(message) if kind == "gradients" else pending

    with patch.object(exchange, "start_sum", start_sum):
        yield


@contextmanager
def _call_becomes(cls: type, change: Callable[[Any, Call], Call]) -> Iterator[None]:
    true = cls.begin
    with patch.object(cls, "begin", lambda layer, sums: change(layer, true(layer, sums))):
        yield


def uncorrected() -> AbstractContextManager[Any]:
    """The gradient is that of a division by a constant."""

    def change(layer: Any, call: Call) -> Call:
        return call._replace(correction=lambda local: 0 * call.correction(local))

    return _call_becomes(PowerNorm, change)


def newest_psi() -> AbstractContextManager[Any]:
    """A batch takes part in the psi that divides it."""

    def change(layer: PowerNorm, call: Call) -> Call:
        layer.settle()
        return call._replace(square=layer.running_square.clone())

    return _call_becomes(PowerNorm, change)


def unscaled() -> AbstractContextManager[Any]:
    """No position is divided by its own root mean square first."""
    return patch.object(PowerNorm, "prepare", lambda layer, x: x)


def without_r() -> AbstractContextManager[Any]:
    """Neither output nor gradient is renormalised."""
    return patch.object(
        WindowNorm, "_renorm", lambda layer, square, number: torch.ones_like(square)
    )


def arithmetic_mean() -> AbstractContextManager[Any]:
    """The window's mean is that of MABN."""
    return patch.object(UnifiedNorm, "average", MABN.average)


def outliers_kept() -> AbstractContextManager[Any]:
    """No step is an outlier."""
    return patch.object(UnifiedNorm, "is_outlier", WindowNorm.is_outlier)


def mean_of_variances() -> AbstractContextManager[Any]:
    """The average over the workers leaves out the variance of their means."""

    def follow(layer: OnlineNorm, total: Tensor) -> None:
        mean, var = mean_of(total).chunk(2)
        keep(layer, total, running_mean=mean, running_var=var)

    def average(layer: OnlineNorm, samples: int) -> None:
        values = torch.cat([layer.running_mean, layer.running_var]).double()
        layer._send(samples, "moments", values, partial(follow, layer))

    return patch.object(OnlineNorm, "average_moments", average)


DEFECTS: dict[tuple[str, str], Callable[[], AbstractContextManager[Any]]] = {
    ("power", "unpooled"): unpooled,
    ("power", "gradients_unpooled"): gradients_unpooled,
    ("power", "uncorrected"): uncorrected,
    ("power", "newest_psi"): newest_psi,
    ("power", "unscaled"): unscaled,
    ("mabn", "unpooled"): unpooled,
    ("mabn", "without_r"): without_r,
    ("mabn_lagged", "gradients_unpooled"): gradients_unpooled,
    ("unified", "unpooled"): unpooled,
    ("unified", "without_r"): without_r,
    ("unified", "arithmetic_mean"): arithmetic_mean,
    ("unified_filtered", "outliers_kept"): outliers_kept,
    ("unified_lagged", "outliers_kept"): outliers_kept,
    ("unified_lagged", "gradients_unpooled"): gradients_unpooled,
    ("online", "unpooled"): unpooled,
    ("online", "gradients_unpooled"): gradients_unpooled,
    ("online", "mean_of_variances"): mean_of_variances,
}
