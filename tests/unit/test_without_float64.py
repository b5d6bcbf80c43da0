"""A device without float64, as Apple's GPUs are: training there, with sums in float32.

The CPU plays that device: its tensors take a device's course, and float64 is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from syncnorm import (
    RenormSchedule,
    SyncBatchNorm,
    SyncBatchRenorm,
    accumulate,
    monitor,
    prepare_ddp,
    recalibrate,
)
from syncnorm.errors import InputError
from syncnorm.functional import sync_batch_norm
from syncnorm.maths import precision
from syncnorm.maths.kernels import portable, traced
from syncnorm.maths.precision import sum_dtype
from syncnorm.model.monitor import _constants
from syncnorm.testing import assert_close
from tests.as_device import as_device


class _NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs, result)):
            if isinstance(t, Tensor) and t.dtype == torch.float64:
                raise TypeError(f"{func.name()}: no float64 on this device")
        return result


@contextmanager
def _a_device() -> Iterator[None]:
    """Have tensors of the CPU be those of a device with no float64 and no kernels of its own."""
    with (
        as_device(),
        mock.patch.object(precision, "_WITHOUT_FLOAT64", ("cpu",)),
        mock.patch.object(portable, "_HAVE_OPERATORS", ()),
        mock.patch.object(portable, "_forward_operator", None),
        mock.patch.object(portable, "_backward_operator", None),
        mock.patch.object(portable, "_SLICE", 1 << 6),
        # Not those of the CPU as it is.
        mock.patch("syncnorm.model.monitor._constants", _constants.__wrapped__),
        _NoFloat64(),
    ):
        yield


@pytest.fixture
def a_device() -> Iterator[None]:
    with _a_device():
        yield


def test_float64_is_noticed_and_is_the_type_of_sums_where_there_is_one():
    assert sum_dtype(torch.device("mps")) == torch.float32
    assert sum_dtype(torch.device("cpu")) == sum_dtype(torch.device("cuda")) == torch.float64
    with _NoFloat64(), pytest.raises(TypeError, match="no float64 on this device"):
        torch.ones(2).double()


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("used", [portable, traced], ids=["portable", "traced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_have_float32_sums(a_device, dtype, used, masked):
    x = (torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(3)) * 2 + 6).to(dtype)
    g = torch.ones(8, 3, 12, 12, dtype=dtype)
    mask = torch.rand(8, 1, 12, 12).round() if masked else None
    w = torch.ones(8, 1, 12, 12) if mask is None else mask
    mean, scale, shift, a, b = torch.rand(5, 3)
    count = w.sum().view(1)
    if used is portable:
        sums = portable.raw_sums(x, mask, None if mask is None else count)
    else:
        p, s1, s2 = traced.centred_sums(x, mask, count)
        sums = torch.cat([s1 + p * count, s2 + p * (2 * s1 + p * count), count])
    y = used.normalize(x, mean, scale, shift)
    backward_sums = used.backward_sums(g, x, mean)
    dx = used.backward_input(g, x, mean, scale, a, b, mask)
    with torch.utils._python_dispatch._disable_current_modes():
        assert sums.dtype == backward_sums.dtype == torch.float32
        wide, w, m, k, h, u, v = (
            t.double() for t in (x, w, *(t.view(-1, 1, 1) for t in (mean, scale, shift, a, b)))
        )
        expected = [(w * wide).sum((0, 2, 3)), (w * wide * wide).sum((0, 2, 3)), w.sum().view(1)]
        assert_close(sums, torch.cat(expected), torch.float32, "sums")
        assert_close(y, (wide - m) * k + h, dtype, "y")
        expected = torch.cat([t.sum((0, 2, 3)) for t in (g.double(), g * (wide - m))])
        assert_close(backward_sums, expected, torch.float32, "backward sums")
        assert_close(dx, k * (g - w * (u + v * (wide - m))), dtype, "input gradient")


class _Body(nn.Module):
    def __init__(self, is_renorm: bool, sync: str, is_checkpointed: bool) -> None:
        super().__init__()
        layers = [
            SyncBatchRenorm(4, schedule=RenormSchedule(2.0, 1.0, 1, 3, 2), sync=sync)
            if is_renorm
            else SyncBatchNorm(4, sync=sync, momentum=None)
            for _ in range(2)
        ]
        self.layers = nn.ModuleList(layers)
        self.is_checkpointed = is_checkpointed

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.is_checkpointed and self.training:
            return checkpoint(self._forward, x, mask, use_reentrant=False)
        return self._forward(x, mask)

    def _forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        first, second = self.layers
        return second(first(x, mask).relu(), mask)


def _course(is_renorm: bool, sync: str, way: str) -> list[Tensor]:
    """Three training steps, an evaluation, the monitor's figures and a recalibration."""
    model = prepare_ddp(_Body(is_renorm, sync, way == "checkpointed"))
    generator = torch.Generator().manual_seed(5)
    seen = []
    for step in range(3):
        x = torch.randn(6, 4, 5, generator=generator).add_(step).requires_grad_()
        mask = torch.rand(6, 1, 5, generator=generator) if way == "masked" else None
        if way == "accumulated":
            with accumulate(model):
                ys = [model(part) for part in x.split(3)]
                torch.stack([y.pow(3).mean() for y in ys]).mean().backward()
        else:
            ys = [model(x, mask)]
            loss = ys[0].pow(3).mean()
            if way == "differentiated":
                (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
                loss = gradient.square().sum() + ys[0].mean()
            loss.backward()
        assert x.grad is not None
        seen += [*(y.detach() for y in ys), x.grad]
        seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
    figures = monitor(model).read()["layers"]
    seen.append(torch.tensor([v for f in figures.values() for v in f.values() if v is not None]))
    batches = [torch.randn(6, 4, 5, generator=generator) for _ in range(2)]
    seen += [model.eval()(batches[0]).detach(), *(b.clone() for b in model.buffers())]
    recalibrate(model.train(), batches)
    return [*seen, *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize(
    "way", ["plain", "masked", "accumulated", "checkpointed", "differentiated"]
)
@pytest.mark.parametrize("sync", ["batch", "none", "running"])
@pytest.mark.parametrize("is_renorm", [False, True], ids=["norm", "renorm"])
def test_a_model_trains_as_on_the_cpu(is_renorm, sync, way):
    expected = _course(is_renorm, sync, way)
    with _a_device():
        got = _course(is_renorm, sync, way)
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert_close(ours, theirs.double(), torch.float32, f"tensor {i}", factor=10.0)


@pytest.mark.parametrize("kind", [SyncBatchNorm, SyncBatchRenorm])
def test_a_momentum_of_one_takes_the_new_value(a_device, kind):
    layer, x = kind(4, momentum=1.0), torch.randn(50, 4) * 1e-2
    layer(x)
    var = x.var(0, correction=int(kind is SyncBatchNorm))
    torch.testing.assert_close(layer.running_var, var, rtol=1e-5, atol=1e-9)


def test_functions_and_transforms(a_device):
    x = torch.randn(6, 4, 5)
    y = sync_batch_norm(x, torch.zeros(4), torch.ones(4), momentum=0.1)
    batched = torch.vmap(lambda x: sync_batch_norm(x, None, None))(x.expand(2, 6, 4, 5))
    torch.testing.assert_close(batched, y.expand(2, 6, 4, 5), rtol=1e-5, atol=1e-5)


def _pooled() -> str:
    with _a_device():
        try:
            SyncBatchNorm(4)(torch.randn(6, 4))
        except InputError as error:
            return str(error)
    return ""


def test_workers_that_pool_are_told_that_it_takes_float64(pool):
    for text in pool(2).run(_pooled):
        assert "must be on a device that has float64 where workers pool" in text
