"""The Triton kernels, in Triton's interpreter, against formulas in float64 and the CPU's rules."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from syncnorm.maths import kernels, lagged, moments, renorm
from syncnorm.maths.kernels.triton import geometry, launch
from syncnorm.maths.moments import Moments, Raw, Unread
from syncnorm.testing import assert_close
from tests.covering import covering
from tests.unit.kernel_inputs import facing, poison, randn
from tests.unit.test_kernels import SHAPES, _arrange
from tests.unit.triton_interpreter import interpreted

# NaN and infinity are computed on purpose; on the CPU, NumPy says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

EPS = 1e-5
# The interpreter takes a millisecond for each operation of a program: those of the CPU kernels'
# shapes that are small, and short planes.
SMALL = [s for s in SHAPES if math.prod(s) < 10_000] + [
    (6, 8, 7, 7),
    (3, 16, 1, 3),
    (5, 6, 9, 16),
    (1, 2, 3, 5, 300),
    # More channels than lanes, and no multiple of them.
    (7, 80),
    (3, 112, 2, 3),
]
F32, F64 = torch.float32, torch.float64


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    before = dict(os.environ)
    with interpreted():
        # Processes that start meanwhile are to find Triton as it is.
        assert os.environ == before
        yield


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    poison(monkeypatch)


def _rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def _over(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _count(x: Tensor, mask: Tensor | None) -> Tensor:
    return (
        (torch.ones_like(x[:, :1]) if mask is None else mask)
        .double()
        .broadcast_to(x.shape[0], 1, *x.shape[2:])
    )


def _raw_sums(x: Tensor, mask: Tensor | None) -> Tensor:
    w, wide = _count(x, mask), x.double()
    return torch.cat(
        [(w * wide).sum(_over(x)), (w * wide * wide).sum(_over(x)), w.sum().reshape(1)]
    )


def _normalize(
    x: Tensor,
    batch: Tensor,
    is_raw: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    reference: tuple[Tensor, Tensor, tuple[Any, Any]] | None = None,
) -> tuple[Tensor, Tensor]:
    """With bounds of r and d as tensors, or as a step and a schedule's numbers."""
    if reference is None:
        return launch.normalize(x, batch, is_raw, weight, bias, eps, *[None] * 6)
    mean, var, (first, second) = reference
    bounds = (first, second, None, None)
    if not isinstance(second, Tensor):
        bounds = (None, None, first, second)
    return launch.normalize(x, batch, is_raw, weight, bias, eps, mean, var, *bounds)


def _backward_sums(
    g: Tensor, x: Tensor, rows: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    types = (None if t is None else t.dtype for t in (weight, bias))
    return launch.backward_sums(g, x, rows, *types)


def _check_all(x: Tensor, g: Tensor, mask: Tensor | None, factor: float = 1.0) -> None:
    """All four passes against float64."""
    channels, dtype = x.shape[1], x.dtype
    weight, bias = _rand(channels, seed=5) + 0.5, randn(channels, seed=6)
    if dtype == F64:
        weight, bias = weight.double(), bias.double()
    sums = launch.moments(x, mask)
    expected = _raw_sums(x, mask)
    # What comes out of the passes in float32 is rounded as float32 is, whatever the input.
    fine = F64 if dtype == F64 else F32
    assert_close(sums, expected, fine, "moments")

    batch = Raw(expected)
    invstd = batch.invstd(EPS)
    xhat = (x.double() - facing(batch.mean, x)) * facing(invstd, x)
    y, rows = _normalize(x, expected, True, weight, bias, EPS)
    assert_close(rows, torch.stack([batch.mean, batch.m2, invstd]), F64, "rows")
    assert_close(y, xhat * facing(weight, x) + facing(bias, x), dtype, "y", factor)

    local, dweight, dbias = _backward_sums(g, x, rows, weight, bias)
    wide = g.double()
    # Sums of terms of both signs: judged by the sum of their magnitudes.
    size = torch.stack([wide.abs().sum(_over(x)), (wide * xhat).abs().sum(_over(x))])
    expected = torch.stack([wide.sum(_over(x)), (wide * xhat).sum(_over(x))])
    assert ((local - expected).abs() <= (1e-13 if dtype == F64 else 2e-6) * size).all()
    assert dweight is not None
    assert dbias is not None
    assert torch.equal(dweight, local[1].to(weight.dtype))
    assert torch.equal(dbias, local[0].to(bias.dtype))

    dx = launch.backward_input(g, x, rows, weight, local, batch.count, mask)
    through = facing(local[0], x) + xhat * facing(local[1], x)
    expected = facing(weight * invstd, x) * (wide - _count(x, mask) * through / batch.count)
    assert_close(dx, expected, dtype, "dx", factor)
    for out in (y, dx):
        assert out.dtype == dtype
        assert out.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize(
    *covering(
        ("shape", "how"),
        shape=SMALL,
        masked=[False, True],
        how=["contiguous", "channels_last", "strided"],
    ),
    ids=str,
)
def test_equal_to_float64(shape, masked, how):
    x = _arrange(randn(*shape) * 2 + 3, how)
    g = _arrange(randn(*shape, seed=1), "contiguous" if how == "channels_last" else how)
    _check_all(x, g, _rand(shape[0], 1, *shape[2:]) if masked else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F64], ids=str)
@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
def test_types(how, dtype):
    shape = (6, 8, 7, 7)
    x = _arrange(randn(*shape) * 2 + 3, how).to(dtype)
    mask = _rand(6, 1, 7, 7).to(dtype)
    _check_all(x, _arrange(randn(*shape, seed=1), how).to(dtype), mask)
    # The gradient, or the mask, may have another type.
    _check_all(x.float(), randn(*shape, seed=1).to(dtype), mask)


def _views() -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    x, g = randn(4, 6, 10, 12), randn(4, 6, 9, 7, seed=1)
    crop = x[:, :, 1:, 3:10]
    last = _arrange(randn(4, 6, 10, 12, seed=2), "channels_last")[:, :, 1:, 3:10]
    return {
        "crop": (crop, g, None),
        "crop of channels last": (last, g, _rand(4, 1, 9, 7)),
        "gradient of a sum": (g, torch.ones(()).expand(4, 6, 9, 7), None),
        "gradient of a mean of channels": (g, randn(4, 6, 1, 1).expand(4, 6, 9, 7), None),
        "gradient in channels last": (crop, last, None),
        "transposed": (randn(4, 9, 6).transpose(1, 2), randn(6, 9, 4).transpose(0, 2).transpose(1, 2), None),
        "of turned planes": (g.transpose(2, 3), g.transpose(2, 3), _rand(1, 1, 7, 1).expand(4, 1, 7, 9)),
        "some channels": (x[:, 1:5], x[:, 2:], None),
        "every other sample": (x[::2], x[1::2], _rand(2, 1, 1, 1).expand(2, 1, 10, 12)),
        "a sample of three": (x[:1].expand(3, -1, -1, -1), randn(3, 6, 10, 12), None),
        "four dimensions": (randn(3, 4, 5, 6, 7)[1:, :, 1:4, 2:5, 1:6], randn(2, 4, 3, 3, 5), None),
    }  # fmt: skip


@pytest.mark.parametrize("name", _views())
def test_views_are_read_as_they_are(name, monkeypatch):
    x, g, mask = _views()[name]

    def refuse(t: Tensor, *args: Any) -> Tensor:
        assert t.ndim < 2, "a copy of x or g"
        return t

    with monkeypatch.context() as context:
        context.setattr(Tensor, "contiguous", refuse)
        _check_all(x, g, mask)


def test_more_than_four_dimensions_are_copied():
    x = randn(3, 2, 4, 4, 4, 4)[1:, :, 1:3, 1:3, 1:3, 1:3]
    _check_all(x, x.transpose(2, 5), _rand(2, 1, 2, 2, 2, 2))
    assert geometry.plan(tuple(x.shape), (x.stride(),), None, 4, geometry.SUMS_OF_ONE, 1) is None


@pytest.mark.parametrize("how", ["contiguous", "channels_last", "strided"])
def test_many_small_tiles_and_splits(how, monkeypatch):
    """Small tiles bring every loop to more than one turn, and are added in a fixed order."""
    for name in ("SUMS_OF_ONE", "SUMS_OF_TWO", "SUMS_OF_MASKED", "ELEMENTWISE"):
        monkeypatch.setattr(launch, name, geometry.Work(8, 64, (3, 3, 3), 1))
    x, mask = _arrange(randn(20, 4, 3) * 2 + 3, how), _rand(20, 1, 3)
    _check_all(x, randn(20, 4, 3, seed=1), mask)
    assert torch.equal(launch.moments(x, mask), launch.moments(x, mask))
    plan = geometry.plan((20, 4, 3), (x.stride(),), None, 4, launch.SUMS_OF_ONE, 1)
    assert plan is not None
    assert plan.splits > 1


def test_more_tiles_than_float32_adds(monkeypatch):
    for name in ("SUMS_OF_ONE", "SUMS_OF_TWO", "SUMS_OF_MASKED"):
        monkeypatch.setattr(launch, name, geometry.Work(8, 64, (3, 3, 3), 1))
    x, g = randn(20, 1, 35) + 1, randn(20, 1, 35, seed=1)
    plan = geometry.plan((20, 1, 35), (x.stride(),), None, 4, launch.SUMS_OF_ONE, 1)
    assert plan is not None
    assert plan.sizes[1] > 16
    for mask in (None, _rand(20, 1, 35)):
        assert_close(launch.moments(x, mask), _raw_sums(x, mask), F32, "moments")
    rows = torch.tensor([[0.5], [1.0], [1.0]], dtype=F64)
    local, *_ = _backward_sums(g, x, rows, None, None)
    expected = torch.stack([g.double().sum(), (g.double() * (x.double() - 0.5)).sum()])
    assert_close(local[:, 0], expected, F32, "local")


def test_offsets_beyond_32_bits():
    """The interpreter reports an overflow of 32 bits."""
    shape, far = (2, 3, 5, 7), (2**31, 2**30, 7, 1)
    near = geometry.plan(shape, (randn(*shape).stride(),), None, 4, geometry.SUMS_OF_ONE, 1)
    wide = geometry.plan(shape, (far,), None, 4, geometry.SUMS_OF_ONE, 1)
    expanded = geometry.plan((2**16, 2, 2**15), ((0, 0, 0),), None, 4, geometry.SUMS_OF_ONE, 132)
    assert near is not None
    assert wide is not None
    assert expanded is not None
    assert (near.shape[-1], wide.shape[-1], expanded.shape[-1]) == (False, True, True)
    # Kernels multiply strides by the unit, in 32 bits where what is left of a stride has so few.
    shape = (2, 64, 128, 512, 512)
    large = geometry.plan(
        shape, (torch.empty(shape, device="meta").stride(),), None, 2, geometry.SUMS_OF_ONE, 132
    )
    assert large is not None
    assert large.strides[0][3] == 2**31
    assert large.shape[2] == 1


def test_channels_that_are_far_apart():
    """Where x has its channels last, and its gradient the last one 2^31 elements from the first."""
    channels, far = 128, 2**24 + 2**18
    x = randn(1, 5, channels).bfloat16().movedim(-1, 1)
    # Of which little is touched; PyTorch's empty tensors are poisoned here.
    memory = torch.from_numpy(np.empty(channels * far, np.uint16)).view(torch.bfloat16)
    g = memory.as_strided((1, channels, 5), (channels * far, far, 1))
    g.copy_(randn(1, channels, 5, seed=1))
    rows = torch.ones(3, channels, dtype=F64)
    local, *_ = _backward_sums(g, x, rows, None, None)
    wide = g.double()
    expected = torch.stack([wide.sum((0, 2)), (wide * (x.double() - 1)).sum((0, 2))])
    assert_close(local, expected, F32, "sums")


@pytest.mark.parametrize("how", ["contiguous", "channels_last", "strided"])
def test_arithmetic_in_64_bits_is_the_same(how, monkeypatch):
    of = geometry.plan

    def wide(*args: Any) -> geometry.Plan | None:
        plan = of(*args)
        return None if plan is None else plan._replace(shape=(*plan.shape[:-1], True))

    monkeypatch.setattr(launch, "plan", wide)
    for shape in [(6, 8, 7, 7), (3, 4, 9, 30)]:
        _check_all(
            _arrange(randn(*shape) + 1, how),
            randn(*shape, seed=1),
            _rand(shape[0], 1, *shape[2:]),
        )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ((8, 2, 56, 56), "contiguous"),
        ((4, 8, 28, 28), "channels_last"),
        ((64, 4, 7, 7), "contiguous"),
        ((3000, 16), "contiguous"),
    ],
    ids=str,
)
def test_variance_at_large_means(shape, how, masked):
    """Padding of weight 0, far from the data, costs no digits either."""
    x = _arrange(randn(*shape, seed=1) + 1e4, how)
    mask = None
    if masked:
        mask = (_rand(shape[0], 1, *shape[2:]) > 0.3).float()
        mask[: shape[0] // 3] = 0.0
        x = _arrange(torch.where(mask > 0, x, 1e30), how)
    got = Raw(launch.moments(x, mask))
    w = _count(x, mask)
    mean = (w * x.double()).sum(_over(x)) / w.sum()
    var = (w * (x.double() - facing(mean, x)).square()).sum(_over(x)) / w.sum()
    assert ((got.var - var).abs() / var).max() <= 1e-5
    assert ((got.mean - mean).abs() <= 1e-6 * var.sqrt()).all()


@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
def test_values_next_to_the_largest_of_their_type(how):
    """The pivot is of the type of x, whose largest value would be rounded to infinity there."""
    x = torch.full((16, 2, 8, 8), torch.finfo(torch.float16).max, dtype=torch.float16)
    x[0, :, 0, 0] = 0.0
    got = launch.moments(_arrange(x, how), None)
    assert_close(got, _raw_sums(x, None), F32, "moments")


@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
def test_the_mean_of_integers_is_exact_however_they_are_sharded(how, dtype):
    """Of a power of two in number; a shard's own mean has more digits than there are."""
    for sizes, seed in itertools.product([(1, 7), (1, 1, 6), (1, 1, 1, 5)], range(4)):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(-64, 64, (8, 3, 2, 2), generator=generator).to(dtype)
        sums = sum(launch.moments(_arrange(part, how), None) for part in x.split(sizes))
        assert torch.equal(sums[:3], x.double().sum(_over(x))), (sizes, seed)


@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
def test_also_of_many(how):
    """Float32 has room for the sums of a tile's lanes."""
    for least, most in [(-64, 64), (0, 2), (1000, 1017)]:
        x = torch.randint(least, most, (64, 3, 16, 16), generator=torch.Generator().manual_seed(2))
        x = _arrange(x.float(), how)
        sums = sum(launch.moments(part, None) for part in x.split([1, 3, 60]))
        assert torch.equal(sums[:3], x.double().sum(_over(x))), (least, most)


@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
def test_also_of_those_that_a_mask_leaves(how):
    """Whatever lies elsewhere."""
    x = torch.randint(-9, 10, (4, 3, 7, 7), generator=torch.Generator().manual_seed(3)).float()
    mask = (_rand(4, 1, 7, 7) > 0.4).float()
    mask[:2] = 0.0
    x = _arrange(torch.where(mask > 0, x, 1e30), how)
    sums = launch.moments(x, mask)
    assert torch.equal(sums[:3], (_count(x, mask) * x.double()).sum(_over(x)))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6, 1e12])
def test_a_constant_has_no_variance(size):
    x = torch.tensor([0.1, -3.7, 2.0 / 3.0])[:, None].expand(7, 3, 11) * size
    got = Raw(launch.moments(x, None))
    assert (got.m2 / got.count <= 1e-20 * got.mean.square()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [1.0, 30.0])
@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
def test_half_types_are_summed_as_exactly_as_float32(how, mean, dtype):
    """Their coarse grid makes float32 round each addition of a long sum the same way."""
    for shape in [(1, 1, 200, 200), (8, 4, 32, 32)]:
        x = _arrange((randn(*shape, seed=4) * 2 + mean).to(dtype), how)
        got, truth = Raw(launch.moments(x, None)), x.double().var(_over(x), correction=0)
        assert ((got.mean - x.double().mean(_over(x))).abs() / truth.sqrt()).max() <= 5e-6
        assert ((got.var - truth).abs() / truth).max() <= 2e-5


@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
def test_sums_of_equal_gradients_do_not_drift(how):
    """Float32 rounds each addition of one number the same way."""
    for shape in [(1, 1, 190, 190), (40, 4, 8, 8)]:
        x, g = _arrange(randn(*shape, seed=6), how), _arrange(torch.full(shape, 0.1), how)
        rows = torch.stack([torch.zeros(shape[1]), *torch.ones(2, shape[1])]).double()
        local, *_ = _backward_sums(g, x, rows, None, None)
        terms = g.double(), (g * x).double()
        expected = torch.stack([t.sum(_over(x)) for t in terms])
        size = torch.stack([t.abs().sum(_over(x)) for t in terms])
        assert ((local - expected).abs() / size).max() <= 4e-6


@pytest.mark.parametrize(
    ("how", "wrong"),
    [
        *(("contiguous", wrong) for wrong in (-1.0, math.inf, -math.inf, math.nan)),
        ("channels_last", math.nan),
        ("runs", -1.0),
        ("split", math.inf),
    ],
)
def test_what_is_no_weight_counts_as_0_and_makes_the_count_nan(how, wrong):
    x = randn(70, 8, 3, 3) if how == "runs" else randn(6, 3, 20, 21)
    if how == "split":
        x = randn(20, 1, 40, 40)
    x = _arrange(x, how)
    mask = _rand(x.shape[0], 1, *x.shape[2:])
    mask[-1, 0, -1, -1] = wrong
    clean = mask.clone()
    clean[-1, 0, -1, -1] = 0.0
    sums, right = launch.moments(x, mask), launch.moments(x, clean)
    assert sums[-1].isnan()
    assert torch.equal(sums[:-1], right[:-1])
    g, c = randn(*x.shape, seed=1), x.shape[1]
    _, rows = _normalize(x, right, True, None, None, EPS)
    totals = randn(2, c, seed=2).double()
    got = launch.backward_input(g, x, rows, None, totals, right[-1], mask)
    assert torch.equal(got, launch.backward_input(g, x, rows, None, totals, right[-1], clean))


@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
def test_nan_is_seen_even_where_nothing_counts(how):
    """One channel's NaN is that channel's."""
    for shape in [(4, 8, 3, 3), (3, 5, 20, 21)]:
        x, mask = _arrange(randn(*shape), how), torch.ones(shape[0], 1, *shape[2:])
        x[1, 2, 1, 1], mask[1, 0, 1, 1] = math.nan, 0.0
        for given in (None, mask):
            sums = launch.moments(x, given)
            is_bad = torch.arange(shape[1]) == 2
            assert torch.equal(sums[: shape[1]].isnan(), is_bad)
            assert torch.equal(sums[shape[1] : -1].isnan(), is_bad)
        y, rows = _normalize(x, sums, True, None, None, EPS)
        assert torch.equal(y.isnan().all(0).all(-1).all(-1), is_bad)
        local, *_ = _backward_sums(x, x, rows, None, None)
        assert torch.equal(local.isnan().any(0), is_bad)


def test_a_mask_of_zeros():
    x = randn(3, 4, 5)
    sums = launch.moments(x, torch.zeros(3, 1, 5))
    assert torch.equal(sums, torch.zeros(9).double())


# Sums of no value, of one, of less than one, of several, and after a fault.
COUNTS = [0.0, 1.0, 0.5, 6.0, math.nan]


def _batch(n: float, is_raw: bool, channels: int = 5) -> Tensor:
    """A pooled statistic: of one value where n <= 1, but for the last channel."""
    mean = randn(channels, seed=7).double()
    m2 = _rand(channels, seed=8).double() * (n if n > 1 else 0.0)
    if n == 0.5:
        m2[-1] = 0.25
    if n == 0:
        mean = torch.zeros(channels).double()
    count = torch.tensor([n], dtype=F64)
    return torch.cat([mean * n, m2 + n * mean * mean, count] if is_raw else [mean, m2, count])


def _moments_of(batch: Tensor, is_raw: bool) -> Moments:
    if is_raw:
        return Raw(batch)
    mean, m2, _ = batch.split(((len(batch) - 1) // 2, (len(batch) - 1) // 2, 1))
    return Unread(batch[-1], mean, m2)


SCHEDULES = [
    (renorm.RenormSchedule(), (0, 4_999, 5_000, 15_000, 26_000, 10**12)),
    (renorm.RenormSchedule.constant(math.inf, math.inf), (0,)),
    (renorm.RenormSchedule.switch(10, 1.1, 0.1), (9, 10)),
    (renorm.RenormSchedule.constant(1.0, 0.0), (3,)),
]


@pytest.mark.parametrize("is_raw", [False, True])
@pytest.mark.parametrize("n", COUNTS)
def test_the_rules_of_a_statistic_are_those_of_moments(n, is_raw):
    x, batch = randn(2, 5, 3), _batch(n, is_raw)
    expected = _moments_of(batch, is_raw)
    y, rows = _normalize(x, batch, is_raw, None, None, EPS)
    # With raw sums m2 may be a rounding error in place of 0, here as there.
    truth = torch.stack([expected.mean, expected.m2, expected.invstd(EPS)])
    assert torch.equal(rows[2] == 0, truth[2] == 0)
    torch.testing.assert_close(rows, truth, rtol=1e-12, atol=1e-12, equal_nan=True)
    centred = x.double() - facing(truth[0], x)
    assert_close(y, centred * facing(rows[2], x), F32, "y")

    running_mean, running_var = randn(5, seed=9), _rand(5, seed=10) + 0.1
    for schedule, steps in SCHEDULES if n == 6.0 and is_raw else SCHEDULES[-2:]:
        numbers = (schedule.r_max, schedule.d_max, schedule.warmup_steps, schedule.r_steps, schedule.d_steps)  # fmt: skip
        for step in map(torch.tensor, steps):
            bounds = schedule.at(step)
            r, d = renorm.correction(expected, running_mean, running_var, EPS, *bounds)
            weight, bias = _rand(5, seed=11), randn(5, seed=12)
            for given in (bounds, (step, numbers)):
                y, rows = _normalize(
                    x, batch, is_raw, weight, bias, EPS, (running_mean, running_var, given)
                )
                torch.testing.assert_close(
                    rows[3:5], torch.stack([r, d]), rtol=1e-12, atol=1e-12, equal_nan=True
                )
                assert torch.equal(rows[5:7], torch.stack([running_mean, running_var]).double())
                assert torch.equal(rows[7:], torch.stack(bounds).double().view(2, 1).expand(2, 5))
                truth = centred * facing(rows[2] * r * weight, x) + facing(bias + weight * d, x)
                assert_close(y, truth, F32, "y")


def test_gradients_with_a_correction():
    x, g, batch = randn(4, 5, 6), randn(4, 5, 6, seed=1), _batch(24.0, True)
    reference = (randn(5, seed=9), _rand(5) + 0.1, (torch.tensor(1.3).double(), torch.tensor(0.4).double()))  # fmt: skip
    for weight, bias in [
        (_rand(5) + 0.5, randn(5)),
        (None, None),
        (_rand(5), None),
        (None, randn(5)),
    ]:
        _, rows = _normalize(x, batch, True, weight, bias, EPS, reference)
        local, dweight, dbias = _backward_sums(g, x, rows, weight, bias)
        assert (dweight is None, dbias is None) == (weight is None, bias is None)
        if dweight is not None:
            torch.testing.assert_close(dweight, (rows[3] * local[1] + rows[4] * local[0]).float())
        if dbias is not None:
            torch.testing.assert_close(dbias, local[0].float())
        dx = launch.backward_input(g, x, rows, weight, local, batch[-1], None)
        scale = rows[3] * rows[2] * (1.0 if weight is None else weight)
        xhat = (x.double() - facing(rows[0], x)) * facing(rows[2], x)
        through = facing(local[0] / 24, x) + xhat * facing(local[1] / 24, x)
        assert_close(dx, facing(scale, x) * (g - through), F32, "dx")
        means = launch.backward_input(g, x, rows, weight, local / batch[-1], None, None)
        assert_close(means, dx, F32, "dx from means")


@pytest.mark.parametrize("n", [0.0, math.nan])
def test_the_gradient_of_a_statistic_of_nothing(n):
    x, g, count = randn(4, 5, 6), randn(4, 5, 6, seed=1), torch.tensor(n).double()
    rows = _rand(3, 5).double()
    dx = launch.backward_input(g, x, rows, None, randn(2, 5).double(), count, None)
    assert_close(dx, facing(rows[2], x) * g * (count + 1), F32, "dx")


@pytest.mark.parametrize("is_raw", [False, True])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("n", COUNTS)
def test_running_statistics_follow_as_they_do_elsewhere(n, momentum, is_raw):
    batch = _batch(n, is_raw, 300)
    expected = _moments_of(batch, is_raw)
    for dtype, is_std in ((F32, False), (torch.bfloat16, True), (F64, False), (F64, True)):
        for counter in (None, torch.tensor(0), torch.tensor(6, dtype=torch.int32)):
            if momentum is None and counter is None:
                continue
            mean, var = randn(300, seed=9).to(dtype), (_rand(300, seed=10) + 0.1).to(dtype)
            truth = [None if t is None else t.clone() for t in (mean, var, counter)]
            factor = moments.average_factor(truth[2], expected, momentum)
            moments.update_running_mean_(truth[0], expected, factor)
            if is_std:
                renorm.update_running_std_(truth[1], expected, EPS, factor)
            else:
                moments.update_running_var_(truth[1], expected, factor)
            launch.update_running_(mean, var, counter, batch, is_raw, momentum, EPS, is_std)
            assert counter == truth[2]
            tight = {"rtol": 1e-12, "atol": 1e-12} if dtype == F64 else {}
            torch.testing.assert_close(mean, truth[0], equal_nan=True, **tight)
            torch.testing.assert_close(var, truth[1], equal_nan=True, **tight)
            if not n > 0:
                assert torch.equal(mean, truth[0])
            if not n > 1:
                assert torch.equal(var, truth[1])


def test_running_statistics_that_are_not_contiguous():
    both = _rand(5, 2)
    expected = [both[:, 0].contiguous(), both[:, 1].contiguous()]
    for mean, var in (expected, (both[:, 0], both[:, 1])):
        launch.update_running_(mean, var, None, _batch(6.0, True), True, 0.1, EPS, False)
    assert torch.equal(both, torch.stack(expected, 1))


def test_a_single_value_has_no_variance_however_it_is_computed():
    """Its square and the square of its sum differ by roundings where they are multiplied and added
    at once.
    """
    value = torch.tensor([1.1, 1e3, 1e-3], dtype=F64)
    square = torch.nextafter(value * value, torch.tensor(math.inf).double())
    x, batch = randn(2, 3), torch.cat([value, square, torch.ones(1).double()])
    y, rows = _normalize(x, batch, True, None, None, EPS)
    assert torch.equal(rows[1:], torch.zeros(2, 3).double())
    assert torch.equal(y, torch.zeros(2, 3))


def _follow(batch, is_raw, mean, var, number, waits, options: lagged.Lagged) -> None:
    launch.follow_moments_(
        batch, is_raw, mean, var, number, waits, EPS,
        options.max_drift, options.max_ratio, options.forward_rate,
    )  # fmt: skip


@pytest.mark.parametrize("max_drift", [0.0, 0.35])
def test_at_the_very_bound_a_layer_waits_as_it_does_elsewhere(max_drift):
    options, decided = lagged.Lagged(max_drift=max_drift), []
    for start, sign in itertools.product((0.3, 0.7, 1.9), (1, -1)):
        at_bound = (start + EPS) * math.exp(sign * 2 * max_drift) - EPS
        for near in (math.nextafter(at_bound, way) for way in (-math.inf, at_bound, math.inf)):
            # A count of a power of two, by which nothing is rounded.
            batch = torch.tensor([0.5, 8 * near, 8.0], dtype=F64)
            mean, var = torch.full((1,), 0.5).double(), torch.full((1,), start, dtype=F64)
            expected = lagged.has_drifted(_moments_of(batch, False), mean, var, EPS, options)
            waits = torch.tensor(0)
            _follow(batch, False, mean, var, torch.tensor(3), waits, options)
            assert waits == expected, (start, near)
            decided.append(waits.item())
    assert {True, False} == set(decided)


@pytest.mark.parametrize("updates", [0, 3])
@pytest.mark.parametrize("max_drift", [0.1, 1e3, math.inf])
@pytest.mark.parametrize("n", [6.0, 0.0, math.nan, math.inf])
@pytest.mark.parametrize("is_raw", [False, True])
def test_averages_of_moments_follow_as_they_do_elsewhere(is_raw, n, max_drift, updates):
    batch = _batch(n, is_raw, 700) if n < math.inf else _batch(6.0, is_raw, 700)
    if n == math.inf:
        batch[600] = math.inf
    options = lagged.Lagged(max_drift=max_drift)
    for waited in (False, True):
        mean, var = randn(700, seed=9).double(), (_rand(700, seed=10) + 0.1).double()
        number, waits = torch.tensor([updates, 5]), torch.tensor(int(waited))
        truth = [t.clone() for t in (mean, var, number, waits)]
        lagged.follow_moments_(
            _moments_of(batch, is_raw), truth[0], truth[1], truth[2][0], truth[3], EPS, options
        )
        _follow(batch, is_raw, mean, var, number[0], waits, options)
        for got, expected in zip((mean, var), truth[:2], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(number, truth[2])
        assert torch.equal(waits, truth[3])


@pytest.mark.parametrize("updates", [0, 3])
@pytest.mark.parametrize("n", [6.0, 0.0, math.nan, math.inf])
def test_averages_of_gradients_follow_as_they_do_elsewhere(n, updates):
    sums, gradient = randn(601).double(), randn(2, 300, seed=1).double()
    sums[-1] = n if n < math.inf else 6.0
    if n == math.inf:
        sums[555] = math.inf
    number, options = torch.tensor([5, updates]), lagged.Lagged()
    truth, count = gradient.clone(), number.clone()
    lagged.follow_gradients_(sums, truth, count[1], options)
    launch.follow_gradients_(sums, gradient, number[1], options.backward_rate)
    torch.testing.assert_close(gradient, truth, rtol=1e-12, atol=1e-12)
    assert torch.equal(number, count)


@pytest.mark.parametrize("count", [1, 2, 511, 512, 1300])
@pytest.mark.parametrize("padding", [1, 700])
def test_messages_carry_their_identity(count, padding):
    message, identity, size = randn(count).double(), 2**38 - 1, count + padding
    message[0] = math.nan
    wire = kernels.triton.add_identity(message[:, None].expand(-1, 2)[:, 1], size, identity)
    expected = kernels.composed.add_identity(message, size, identity)
    torch.testing.assert_close(wire, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("identity", [2**37, 2**37 + 1, 2**38 - 1])
@pytest.mark.parametrize("times", [0, 1, 3, 2**15])
@pytest.mark.parametrize("more", [0, 1, -1, 2**36, math.nan, math.inf, -math.inf])
def test_sums_of_other_messages_are_nan(identity, times, more):
    last = torch.tensor([5.0, times * identity + more], dtype=torch.float64)
    wire = torch.cat([randn(700).double(), last])
    expected = wire.clone()
    if more != 0:
        expected[:700] = math.nan
    for own in (kernels.triton, kernels.composed):
        found = wire.clone()
        own.compare_identity_(found, 700, identity)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_what_is_written_in_place_is_known_to_autograd():
    """Evaluation keeps the running statistics for its backward pass: moved since, it must raise."""
    mean, var, count = randn(5), _rand(5) + 0.1, torch.tensor(0)
    x = randn(2, 5).requires_grad_()
    y = torch.nn.functional.batch_norm(x, mean, var)
    batch = moments.Raw(_batch(6.0, True))
    kernels.triton.update_running_(mean, var, count, batch, 0.1, EPS, False)
    assert (mean._version, var._version, count._version) == (1, 1, 1)
    options, waits = lagged.Lagged(), torch.tensor(1)
    mean, var, gradient = (t.double() for t in (randn(5), _rand(5), randn(2, 5)))
    updates = torch.zeros(2, dtype=torch.int64)
    kernels.triton.follow_moments_(batch, mean, var, updates[0], waits, EPS, options)
    assert (mean._version, var._version, updates._version, waits._version) == (1, 1, 1, 1)
    kernels.triton.follow_gradients_(_batch(6.0, True), gradient, updates[1], options)
    assert (gradient._version, updates._version) == (1, 2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_first_use_within_a_capture_decides_nothing(monkeypatch):
    """There nothing can be tried, and a sync-debug mode is not the kernels' fault."""
    device, modes = torch.device("cuda", 0), ["error"]
    capturing = iter([True, False])
    monkeypatch.setattr(kernels.triton, "_usable", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: next(capturing))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(kernels.triton, "_has_worked", lambda _: modes[-1] == "default")
    assert [kernels.triton.is_usable(device) for _ in range(3)] == [False, True, True]
    assert modes == ["error", "default", "error"]


def test_a_first_use_does_not_touch_a_mode_that_nobody_has_set(monkeypatch):
    """torch warns whoever sets one that it is a prototype."""
    monkeypatch.setattr(kernels.triton, "_usable", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda _: pytest.fail("is set"))
    monkeypatch.setattr(kernels.triton, "_has_worked", lambda _: True)
    assert kernels.triton.is_usable(torch.device("cuda", 0))
