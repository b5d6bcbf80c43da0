"""The four primitives, both implementations against float64: layouts, block shapes, large means."""

from __future__ import annotations

import copy
from contextlib import ExitStack, nullcontext
from types import ModuleType

import pytest
import torch
from torch import Tensor

from syncnorm import SyncBatchNorm, SyncBatchRenorm, reference
from syncnorm.maths import kernels
from syncnorm.maths.kernels import composed, cpu, layout, portable, traced
from syncnorm.maths.moments import Raw
from syncnorm.testing import assert_close
from tests import as_device
from tests.covering import covering

# One shape for every way of cutting a tensor into blocks, and the odd ones.
SHAPES = [
    (200, 3),
    (9000, 17),
    (4, 3, 7),
    (40, 64, 20, 20),
    (3, 150, 40, 40),
    (2, 3, 190, 190),
    (2, 2, 300, 300),
    (1, 2, 3, 60, 300),
    (1, 5, 2053),
    (5, 1, 8, 8),
    (4, 6, 1, 1),
]


IMPLEMENTATIONS = ["cpu", "portable", "portable in slices", "traced"]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch) -> ModuleType:
    used = {"cpu": cpu, "traced": traced}.get(request.param, portable)
    monkeypatch.setattr(kernels, "_primitives_for", lambda x: used)
    if used is portable:
        monkeypatch.setattr(kernels, "local_moments", composed.moments)
        # A CPU's own multiplies out.
        monkeypatch.setattr(portable, "_forward_operator", as_device.batch_norm)
    if request.param == "portable in slices":
        monkeypatch.setattr(portable, "_HAVE_OPERATORS", ())
        monkeypatch.setattr(portable, "_SLICE", 1 << 14)
    return used


def _arrange(x: torch.Tensor, how: str) -> torch.Tensor:
    if how == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if how == "strided":
        return torch.stack([x, x], dim=-1)[..., 0]
    return x.contiguous()


@pytest.mark.parametrize(
    *covering(
        ("implementation", "shape", "how"),
        implementation=IMPLEMENTATIONS,
        shape=SHAPES,
        masked=[False, True],
        how=["contiguous", "channels_last", "strided"],
    ),
    ids=str,
    indirect=["implementation"],
)
def test_equal_to_float64(implementation, shape, masked, how):
    generator = torch.Generator().manual_seed(0)
    x = _arrange(torch.randn(shape, generator=generator) * 2 + 3, how)
    g = _arrange(
        torch.randn(shape, generator=generator), "contiguous" if how == "channels_last" else how
    )
    mask = torch.rand(shape[0], 1, *shape[2:], generator=generator) if masked else None
    channels, dims = shape[1], [0, *range(2, len(shape))]
    x64, g64 = x.double(), g.double()
    w = torch.ones_like(x64[:, :1]) if mask is None else mask.double()
    mean, scale, shift, a, b = (
        torch.randn(channels, generator=generator).double() for _ in range(5)
    )
    face = (-1, *[1] * (len(shape) - 2))

    sums = kernels.local_moments(x, mask)
    expected = torch.cat([(w * x64).sum(dims), (w * x64 * x64).sum(dims), w.sum().reshape(1)])
    assert_close(sums, expected, torch.float32, "local_moments")

    y = kernels.normalize(x, mean, scale, shift)
    assert_close(
        y, (x64 - mean.view(face)) * scale.view(face) + shift.view(face), torch.float32, "normalize"
    )

    sums = kernels.backward_sums(g, x, mean)
    centred = x64 - mean.view(face)
    # Sums of terms of both signs: judged by the sum of their magnitudes.
    size = torch.cat([g64.abs().sum(dims), (g64 * centred).abs().sum(dims)])
    expected = torch.cat([g64.sum(dims), (g64 * centred).sum(dims)])
    assert ((sums - expected).abs() <= 2e-6 * size).all()

    dx = kernels.backward_input(g, x, mean, scale, a, b, mask)
    expected = scale.view(face) * (g64 - w * (a.view(face) + b.view(face) * centred))
    assert_close(dx, expected, torch.float32, "backward_input")
    for out in (y, dx):
        assert out.dtype == x.dtype
        if how != "strided":
            assert out.stride() == x.stride()


@pytest.mark.parametrize("ratio", [0.0, 1e2, 1e3, 1e4])
@pytest.mark.parametrize(
    ("shape", "how", "bound"),
    [
        ((32, 64, 56, 56), "contiguous", 1e-5),
        ((32, 64, 56, 56), "channels_last", 5e-5),
        ((16, 512, 7, 7), "contiguous", 1e-5),
        ((16, 512, 7, 7), "channels_last", 5e-5),
        ((20000, 64), "contiguous", 5e-5),
        ((2, 2, 400, 400), "contiguous", 1e-5),
    ],
    ids=str,
)
def test_variance_at_large_means(shape, how, bound, ratio):
    """A block sum in plain float32 would be off by 1e-3 at mean/std 1e2 and useless at 1e4."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + ratio
    x = _arrange(x, how)
    got = Raw(kernels.local_moments(x, None))
    dims = [0, *range(2, len(shape))]
    truth = x.double().var(dims, correction=0)
    assert ((got.var - truth).abs() / truth).max() <= bound
    assert ((got.mean - x.double().mean(dims)).abs() <= 1e-6 * truth.sqrt()).all()


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e5])
@pytest.mark.parametrize("how", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("masked", [False, True])
def test_large_means_cost_nothing(implementation, how, masked, ratio):
    """With a mean in float32 y is off by 8e-4 at mean/std 1e4, and the gradient of weight by 2e-4."""
    generator = torch.Generator().manual_seed(3)
    x, g = (_arrange(torch.randn(16, 8, 10, 10, generator=generator), how) for _ in range(2))
    x += ratio
    mask = torch.rand(16, 1, 10, 10, generator=generator) if masked else None
    mean = x.double().mean((0, 2, 3))
    scale, shift, a, b = (torch.randn(8, generator=generator).double() for _ in range(4))
    centred, w = x.double() - mean.view(-1, 1, 1), 1.0 if mask is None else mask.double()
    scale_, shift_, a_, b_ = (c.view(-1, 1, 1) for c in (scale, shift, a, b))

    y = kernels.normalize(x, mean, scale, shift)
    assert (y - (centred * scale_ + shift_)).abs().max() <= 2e-6
    products = g.double() * centred
    got = kernels.backward_sums(g, x, mean)[8:]
    assert (got - products.sum((0, 2, 3))).abs().max() <= 2e-6 * products.abs().sum((0, 2, 3)).max()
    dx = kernels.backward_input(g, x, mean, scale, a, b, mask)
    assert (dx - scale_ * (g - w * (a_ + b_ * centred))).abs().max() <= 2e-5


@pytest.mark.parametrize("course", ["native", "cpu", "composed", "triton"])
@pytest.mark.parametrize("make", [SyncBatchNorm, SyncBatchRenorm])
def test_a_layer_keeps_its_digits_at_large_means(make, course, monkeypatch):
    x = torch.randn(16, 8, 10, 10, generator=torch.Generator().manual_seed(5)) + 1e4
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
    layer = make(8, **{"schedule": lambda step: (3.0, 5.0)} if make is SyncBatchRenorm else {})
    with torch.no_grad():
        layer.running_mean.fill_(1e4)
        for each in layer.parameters():
            each.copy_(torch.linspace(-1, 2, 8))
    truth = copy.deepcopy(layer).double()
    if course == "native" and not kernels.native.is_usable(x):
        pytest.skip("the native library is not built")
    if course == "cpu":
        monkeypatch.setattr(kernels.native, "is_usable", lambda *_: False)
    outcomes = []
    for each in (layer, truth):
        v = x.to(each.weight.dtype, copy=True).requires_grad_()
        with ExitStack() as stack:
            if each is layer and course in ("composed", "triton"):
                stack.enter_context(as_device.as_device(course))
                stack.enter_context(as_device.as_on_cuda())
            y = each(v)
            y.backward(cotangent.to(y.dtype))
        outcomes.append((y, v.grad, each.weight.grad, each.bias.grad))
    names = ("y", "input gradient", "weight gradient", "bias gradient")
    for name, got, expected in zip(names, *outcomes, strict=True):
        # See docs/cuda.md.
        factor = {"input gradient": 2.0, "weight gradient": 50.0}.get(name, 1.0)
        factor = factor if course == "composed" else 1.0
        assert_close(got, expected, torch.float32, name, factor=factor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 260, 260), (8, 16, 64, 64), (20000, 16), (4, 8, 16, 16)], ids=str
)
def test_half_types_are_summed_as_exactly_as_float32(implementation, shape, how, mean, dtype):
    """Their coarse grid makes float32 round each addition the same way.

    Without the scattering the errors are 4e-5 and 1e-4.
    """
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)) * 2 + mean
    x = _arrange(x.to(dtype), how)
    dims = [0, *range(2, len(shape))]
    got, truth = Raw(kernels.local_moments(x, None)), x.double().var(dims, correction=0)
    assert ((got.mean - x.double().mean(dims)).abs() / truth.sqrt()).max() <= 5e-6
    assert ((got.var - truth).abs() / truth).max() <= 2e-5


@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(2, 8, 256, 256), (1, 3, 190, 190), (3, 4, 4099), (40, 32, 16, 16)], ids=str
)
def test_sums_of_equal_gradients_do_not_drift(implementation, shape, how):
    """Float32 rounds each addition of one number the same way: one by one these are off by 4e-5."""
    x = _arrange(torch.randn(shape, generator=torch.Generator().manual_seed(6)), how)
    g = _arrange(torch.full(shape, 0.1), how)
    channels, dims = shape[1], [0, *range(2, len(shape))]
    sums = kernels.backward_sums(g, x, torch.zeros(channels).double())
    expected = torch.cat([g.double().sum(dims), (g * x).double().sum(dims)])
    size = torch.cat([g.double().sum(dims), (g * x).double().abs().sum(dims)])
    assert ((sums - expected).abs() / size).max() <= 4e-6


def test_a_mask_keeps_its_elements_out_of_the_pivot():
    """Padding of weight 0, far from the data, costs no digits."""
    x = torch.randn(64, 4, 32, generator=torch.Generator().manual_seed(2)) + 1e4
    mask = torch.zeros(64, 1, 32)
    mask[:, :, 20:] = 1.0
    got = Raw(kernels.local_moments(torch.where(mask > 0, x, -1e4), mask))
    truth = x[:, :, 20:].double().var((0, 2), correction=0)
    assert ((got.var - truth).abs() / truth).max() <= 1e-5


def test_blocks_cover_every_element_once():
    for shape in SHAPES:
        v = layout.view(torch.arange(torch.Size(shape).numel()).view(shape), rows=False)
        if len(shape) == 2:
            v = v.squeeze(-1)
        blocks = layout.Cut.of(v).blocks(v)
        assert torch.equal(torch.cat([b.flatten() for b in blocks]).sort().values, v.flatten())
        assert all(
            b.is_contiguous() and b.numel() <= max(layout.BLOCK_ELEMENTS, v[:1].numel())
            for b in blocks
        )


def test_atens_operator_means_what_the_kernels_of_a_cpu_take_it_to_mean():
    """native_batch_norm_backward in evaluation mode: (sum g (x - mean) / std, sum g).

    Not a documented function.
    """
    g, x = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    mean, one, zero = torch.tensor([0.5, -1.0]), torch.ones(2), torch.zeros(2)
    _, products, total = torch.ops.aten.native_batch_norm_backward.default(
        g, x, one, mean, one, zero, one, False, 0.0, [False, True, True]
    )
    torch.testing.assert_close(products, (g * (x - mean.view(2, 1))).sum((0, 2)))
    torch.testing.assert_close(total, g.sum((0, 2)))


def test_empty_tensors_reach_no_kernel(monkeypatch):
    monkeypatch.setattr(kernels, "_primitives_for", lambda x: pytest.fail("reached"))
    for shape in [(0, 3), (0, 3, 4, 4), (2, 3, 0)]:
        x, c = torch.empty(shape), torch.zeros(3).double()
        assert torch.equal(kernels.local_moments(x, None), torch.zeros(7).double())
        assert torch.equal(kernels.backward_sums(x, x, c), torch.zeros(6).double())
        assert (
            kernels.normalize(x, c, c, c).shape
            == kernels.backward_input(x, x, c, c, c, c, None).shape
            == shape
        )


def _single_values(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """40 batches of a value that counts, by a weight below 1, and one that does not; (40, 2, 16)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 2, 16, generator=generator).double() * 3 + 1
    weights = torch.rand(40, 2, 1, generator=generator).double() * torch.tensor([[[1.0], [0.0]]])
    return x.to(dtype), weights.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("course", ["native", "cpu", "composed", "triton", "transformed", "oracle"])
def test_a_single_value_says_nothing_about_scale_whatever_its_weight(course, dtype, monkeypatch):
    """Its mean and its variance are rounded, by each kernel in its own way."""
    if course == "cpu":
        monkeypatch.setattr(kernels.native, "is_usable", lambda *_: False)
    bias = torch.arange(-8.0, 8.0)
    layer = SyncBatchNorm(16, track_running_stats=course != "transformed")
    with torch.no_grad():
        layer.bias.copy_(bias)

    def call(x: Tensor, w: Tensor) -> Tensor:
        if course == "oracle":
            return reference.batch_norm(x, bias=bias, mask=w)
        return layer(x, w)

    def pulled(x: Tensor, w: Tensor) -> Tensor:
        return torch.func.grad(lambda v: (call(v, w) * torch.arange(16.0)).sum())(x)

    with ExitStack() as stack:
        if course in ("composed", "triton"):
            stack.enter_context(as_device.as_device(course))
            stack.enter_context(as_device.as_on_cuda())
        for x, w in zip(*_single_values(dtype), strict=True):
            if course == "transformed":
                assert torch.equal(pulled(x, w), torch.zeros_like(x))
                continue
            x.requires_grad_()
            y = call(x, w)
            assert torch.equal(y, bias.to(y.dtype).expand_as(y))
            (y * torch.arange(16.0)).sum().backward()
            assert torch.equal(x.grad, torch.zeros_like(x))
    if layer.running_var is not None:
        assert torch.equal(layer.running_var, torch.ones(16))


@pytest.mark.parametrize("course", ["native", "cpu", "composed", "triton"])
def test_several_values_keep_a_variance_that_is_nearly_rounding(course, monkeypatch):
    """What a single value may be off by is no rule for more of them."""
    if course == "cpu":
        monkeypatch.setattr(kernels.native, "is_usable", lambda *_: False)
    x = 1.9e7 + torch.randn(
        64, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    layer = SyncBatchNorm(4, momentum=1.0, dtype=torch.float64)
    with as_device.as_device(course) if course in ("composed", "triton") else nullcontext():
        y = layer(x)
    assert (y - reference.batch_norm(x)).abs().max() < 0.5
    assert (layer.running_var - 1).abs().max() < 0.5


@pytest.mark.parametrize("course", ["native", "composed", "triton"])
@pytest.mark.parametrize("std", [1e18, 1e-18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_range_is_that_of_the_type(course, std, dtype):
    """A sum of squares in float32 would end at 1e19 over the root of the number of values."""
    x = (std * torch.randn(64, 4, 16, generator=torch.Generator().manual_seed(0))).to(dtype)
    if course == "native" and not kernels.native.is_usable(x):
        pytest.skip("the native library is not built")
    layer = SyncBatchNorm(4, eps=1e-60, momentum=1.0, dtype=torch.float64)
    with ExitStack() as stack:
        if course in ("composed", "triton"):
            stack.enter_context(as_device.as_device(course))
            stack.enter_context(as_device.as_on_cuda())
        y = layer(x)
    assert_close(y, reference.batch_norm(x.double(), eps=1e-60), dtype, "output")
    var = x.double().transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(layer.running_var, var, rtol=1e-5, atol=0)
