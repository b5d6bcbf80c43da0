"""One process against the oracle: precision, views, and more elements than 32 bits can count."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from syncnorm import SyncBatchNorm
from syncnorm.testing import assert_close
from tests.distributed.steps import Batch, make_layer, oracle_steps, parameters

pytestmark = pytest.mark.cuda

# From a batch to one of the same values that lies in memory in another way.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "crop": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "crop of both": lambda t: torch.nn.functional.pad(t, (1, 2, 3, 1))[..., 3:-1, 1:-2],
    "some channels": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "every other sample": lambda t: t.repeat_interleave(2, 0)[::2],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch innermost": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "crop of rows": lambda t: torch.cat([rows(t), rows(t)], -1)[..., : t.shape[-1]],
}


def rows(t: Tensor) -> Tensor:
    """The same values with the channels innermost."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def check(
    device: str,
    batch: Batch,
    options: dict | None = None,
    view_x: Callable[[Tensor], Tensor] = torch.clone,
    view_g: Callable[[Tensor], Tensor] = torch.clone,
    factor: float = 2.0,
) -> None:
    """A step of a layer alone must be the oracle's."""
    options = options or {}
    expected, dtype, channels = oracle_steps([batch], options)[0], batch.x.dtype, batch.x.shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layer = make_layer(channels, dtype=wide, device=device, **options)
    with torch.no_grad():
        for own, value in zip((layer.weight, layer.bias), parameters(channels, wide), strict=True):
            own.copy_(value)
    x = view_x(batch.x.to(device)).detach().requires_grad_()
    y = layer(x, None if batch.mask is None else batch.mask.to(device))
    y.backward(view_g(batch.cotangent.to(device)))
    assert x.grad is not None
    assert_close(y.cpu(), expected.y, dtype, "y", factor)
    assert_close(x.grad.cpu(), expected.grad_input, dtype, "grad_input", factor)
    for name, value in layer.named_buffers():
        assert_close(value.cpu(), expected.buffers[name], wide, name, factor)
    for name, value in layer.named_parameters():
        assert value.grad is not None
        assert_close(value.grad.cpu(), expected.parameters[name], wide, f"grad_{name}", factor)


def _shifted(t: Tensor, by: int) -> Tensor:
    """The same values, some elements behind the start of their memory."""
    return torch.cat([t.new_zeros(by), t.flatten()])[by:].view(t.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_of_one_shape_at_other_addresses(device, dtype):
    """A kernel is compiled for an alignment; what starts it is kept, for tensors of that alone."""
    batch = Batch.random((8, 24, 6, 6), dtype)
    for x, g in itertools.product((0, 1, 0, 8), (0, 1)):
        check(
            device,
            batch,
            None,
            functools.partial(_shifted, by=x),
            functools.partial(_shifted, by=g),
        )


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("view", VIEWS)
def test_views_that_are_not_dense(device, view, masked):
    batch = Batch.random((6, 5, 8, 9), torch.float32, masked=masked)
    check(device, batch, None, VIEWS[view], VIEWS[view])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_that_lies_in_another_way(device, dtype):
    batch = Batch.random((6, 16, 8, 8), dtype)
    check(device, batch, None, rows, torch.clone)
    check(device, batch, None, torch.clone, rows)
    one = batch.cotangent[:, :, :1, :1]
    expanded = Batch(batch.x, one.expand_as(batch.x))
    check(device, expanded, None, rows, lambda g: g[:, :, :1, :1].expand_as(g))


@pytest.mark.parametrize("layout", [torch.clone, rows], ids=["planes", "rows"])
@pytest.mark.parametrize(
    "shape",
    [
        *((4, 3, 65, 67), (64, 2048), (256, 7, 3), (3, 1, 5, 1)),
        # More channels than a block of rows has, and no multiple of them.
        *((9, 1000), (5, 80, 3, 3)),
    ],
    ids=str,
)
def test_sizes_that_no_block_divides(device, shape, layout):
    for dtype in (torch.float32, torch.bfloat16):
        check(device, Batch.random(shape, dtype), {"bounds": (1.25, 0.25)}, layout, layout)


SHAPES = [
    (64, 64, 112, 112),
    (128, 256, 28, 28),
    (256, 2048, 7, 7),
    (128, 672, 14, 14),
    (2, 3, 999, 512),
    (300_001, 64),
]


@pytest.mark.parametrize("layout", [torch.clone, rows], ids=["planes", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes_of_networks(device, shape, dtype, layout):
    """Sums are split over many programs. torch's layer, in float64 on the same device, is right."""
    shape = shape if device == "cuda" else (-(-shape[0] // 64), *shape[1:])
    g = torch.Generator(device).manual_seed(0)
    x, cotangent = (
        layout(torch.randn(shape, generator=g, device=device).add_(1.0).to(dtype)) for _ in range(2)
    )
    layer = SyncBatchNorm(shape[1], device=device, momentum=1.0)
    x.requires_grad_()
    y = layer(x)
    y.backward(cotangent)
    exact = x.detach().double().contiguous().requires_grad_()
    truth = nn.functional.batch_norm(exact, None, None, training=True, eps=layer.eps)
    truth.backward(cotangent.double())
    assert x.grad is not None
    assert exact.grad is not None
    assert_close(y, truth, dtype, "y", 2.0)
    assert_close(x.grad, exact.grad, dtype, "grad_input", 2.0)
    dims = [0, *range(2, x.ndim)]
    assert_close(layer.running_mean, exact.mean(dims), torch.float32, "running_mean")
    assert_close(layer.running_var, exact.var(dims), torch.float32, "running_var")
    for got, terms in (
        (layer.bias.grad, cotangent.double()),
        (layer.weight.grad, cotangent * truth),
    ):
        assert got is not None
        # Sums that nearly cancel are judged by what they are sums of.
        assert ((got - terms.sum(dims)).abs() <= 1e-6 * terms.abs().sum(dims)).all()


@pytest.mark.parametrize("layout", [torch.clone, rows], ids=["planes", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_takes_no_memory_but_for_its_results(device, dtype, layout):
    pytest.importorskip("triton")
    shape = (64, 64, 112, 112) if device == "cuda" else (2, 3, 4, 5)
    x, g = (layout(torch.randn(shape, device=device).to(dtype)) for _ in range(2))
    layer = SyncBatchNorm(shape[1], device=device)
    x.requires_grad_()
    for _ in range(2):
        x.grad = None
        layer.zero_grad()
        y, forward = _peak(device, lambda: layer(x))
        _, backward = _peak(device, lambda y=y: y.backward(g))
    assert forward <= 1.05 * x.nbytes
    assert backward <= 1.05 * x.nbytes


def _peak(device: str, function: Callable[[], Any]) -> tuple[Any, int]:
    """The result, and the bytes that were taken at once; 0 on a CPU."""
    if device != "cuda":
        return function(), 0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    return result, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("layout", [torch.clone, rows], ids=["planes", "rows"])
def test_a_mean_of_ten_thousand_standard_deviations(device, layout, masked):
    batch = Batch.random((16, 4, 40, 40), torch.float32, mean=1e4, std=1.0, masked=masked)
    expected = oracle_steps([batch], {"momentum": 1.0})[0].buffers["running_var"]
    layer = SyncBatchNorm(4, momentum=1.0, device=device, dtype=torch.float64)
    layer(layout(batch.x.to(device)), None if batch.mask is None else batch.mask.to(device))
    assert layer.running_var is not None
    assert ((layer.running_var.cpu() - expected).abs() / expected).max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.clone, rows], ids=["planes", "rows"])
def test_a_long_sum_of_equal_numbers(device, layout, dtype):
    """A sum in float32 drifts where each addition is rounded the same way."""
    x = torch.randn(32, 2, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    value = torch.tensor(0.1).to(dtype)
    layer = SyncBatchNorm(2, device=device)
    y = layer(layout(x.to(device)).requires_grad_())
    y.backward(layout(torch.full_like(x, value.item()).to(device)))
    assert layer.bias.grad is not None
    exact = value.double().item() * (x.numel() // 2)
    assert (layer.bias.grad.double().cpu() / exact - 1.0).abs().max() <= 5e-6


def test_padding_of_weight_zero_may_be_anything(device):
    batch = Batch.random((6, 5, 8, 9), torch.float32, masked=True)
    assert batch.mask is not None
    batch.x.masked_fill_(batch.mask.expand_as(batch.x) == 0, 1e30)
    expected = oracle_steps([batch], {})[0].buffers
    layer = SyncBatchNorm(5, device=device)
    layer(batch.x.to(device), batch.mask.to(device))
    for name, value in layer.named_buffers():
        assert_close(value.cpu(), expected[name], torch.float32, name)


@pytest.mark.parametrize("layout", [torch.clone, rows], ids=["planes", "rows"])
def test_more_elements_than_32_bits_can_count(device, layout):
    """Each quarter of the batch is the same, so that one quarter tells what all must be."""
    channels, plane = 4, 2**27 + 24 if device == "cuda" else 24
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("less than 40 GB of the device's memory is free")
    g = torch.Generator(device).manual_seed(0)
    quarter = torch.randn(1, channels, plane, generator=g, device=device, dtype=torch.bfloat16)
    quarter_g = torch.randn(1, channels, plane, generator=g, device=device, dtype=torch.bfloat16)
    small = SyncBatchNorm(channels, device=device, momentum=1.0)
    big = SyncBatchNorm(channels, device=device, momentum=1.0)
    part = layout(quarter).requires_grad_()
    small(part).backward(layout(quarter_g))
    x = layout(quarter.expand(4, -1, -1)).requires_grad_()
    assert device != "cuda" or x.numel() > 2**31
    y = big(x)
    y.backward(layout(quarter_g.expand(4, -1, -1)))
    assert x.grad is not None
    assert part.grad is not None
    mean = quarter.double().mean((0, 2))
    assert big.running_mean is not None
    assert_close(big.running_mean, mean, torch.float32, "mean")
    for number in range(4):
        assert torch.equal(y[number], y[0]), number
        assert torch.equal(x.grad[number], x.grad[0]), number
    # Statistics are the same but for the order of the sums: the last bit may fall another way.
    off = (x.grad[3].float() - part.grad[0].float()).abs().max()
    assert off <= 2**-7 * part.grad.abs().max()
