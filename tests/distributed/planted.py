"""Defects for the fuzz drill, each in the package of this process for as long as its block lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from syncnorm import autograd, ops
from syncnorm.fused import FusedNormalize
from syncnorm.maths import moments
from syncnorm.maths.kernels import composed
from syncnorm.module import SyncNorm
from syncnorm.recomputing import is_recomputing
from tests.as_device import as_device


@contextmanager
def local_count() -> Iterator[None]:
    """The gradient of the input divides the pooled sums by this worker's count."""
    true = ops.pooled_statistic

    def pooled_statistic(
        local: ops.LocalSums, group: Any, name: str, **options: Any
    ) -> ops.Statistic:
        means = ops.PooledMeans(moments.Raw(local.sums), group, name)
        return true(local, group, name, **options)._replace(gradient_means=means)

    with patch.object(ops, "pooled_statistic", pooled_statistic):
        yield


@contextmanager
def narrow_wire() -> Iterator[None]:
    """Sums travel in the input's type."""
    true = ops.local_sums

    def local_sums(x: Tensor, *others: Tensor | None) -> ops.LocalSums:
        local = true(x, *others)
        return local._replace(sums=local.sums.to(x.dtype).double())

    with patch.object(ops, "local_sums", local_sums):
        yield


@contextmanager
def unguarded_count() -> Iterator[None]:
    """1 / count, whatever the count, on the course of a device, where no worker looks at one."""

    def reciprocal(count: float | Tensor) -> Tensor:
        return 1.0 / torch.as_tensor(count, dtype=torch.float64)

    with (
        as_device("composed"),
        patch.object(moments, "reciprocal", reciprocal),
        patch.object(ops, "reciprocal", reciprocal),
        patch.object(composed, "_positive", lambda n: n),
    ):
        yield


@contextmanager
def counted_twice() -> Iterator[None]:
    """The counter moves again where a checkpoint repeats a forward."""
    true = SyncNorm.train_forward

    def train_forward(self: SyncNorm, x: Tensor, mask: Tensor | None) -> Tensor:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += is_recomputing()
        return true(self, x, mask)

    with patch.object(SyncNorm, "train_forward", train_forward):
        yield


@contextmanager
def gated_exchange() -> Iterator[None]:
    """The exchange of the backward pass is left out where the input needs no gradient."""
    true = autograd._gradient
    alone = SimpleNamespace(totals=lambda local: (local, None))

    def _gradient(*args: Any) -> Any:
        *others, gradient_means, bias_dtype, needs_input = args
        means = gradient_means if needs_input else alone
        return true(*others, means, bias_dtype, needs_input)

    true_backward = FusedNormalize.backward

    def backward(ctx: Any, g: Tensor) -> Any:
        if not ctx.needs_input_grad[0]:
            ctx.gradient_means = alone
        return true_backward(ctx, g)

    with (
        patch.object(autograd, "_gradient", _gradient),
        patch.object(FusedNormalize, "backward", staticmethod(backward)),
    ):
        yield
