"""The native kernels against formulas in float64, and the library's build."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from syncnorm import SyncBatchNorm, SyncBatchRenorm, native
from syncnorm.maths import kernels, lagged, moments
from syncnorm.maths.kernels import composed
from syncnorm.maths.kernels import native as ours
from syncnorm.maths.kernels.arguments import Reference, Scheduled
from syncnorm.maths.moments import Moments, Packed, Raw
from syncnorm.maths.renorm import RenormSchedule
from syncnorm.native import build
from tests import ways
from tests.covering import covering
from tests.operators import Operators
from tests.unit.kernel_inputs import facing, poison, randn
from tests.unit.test_kernels import SHAPES

EPS = 1e-5
assert_close = functools.partial(torch.testing.assert_close, equal_nan=True)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Short planes, rows that do not divide into wide ones, several units of work, tiles of channels.
OF_OWN = [
    (9, 3), (1, 2), (100, 1), (5, 16, 3), (3, 200, 2, 2), (2, 1030, 4), (7, 2000), (1, 1, 40),
    (2, 3, 70_000), (140_000, 2), (9, 16, 40, 40), (3, 5, 4, 4, 4), (33, 7, 1, 1), (4, 6, 17),
]  # fmt: skip

needs_library = pytest.mark.skipif(native.library() is None, reason=native.load().detail)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    poison(monkeypatch)


def _mask(x: Tensor) -> Tensor:
    """Weights of which a third are 0."""
    w = torch.rand(x.shape[0], 1, *x.shape[2:], generator=torch.Generator().manual_seed(7))
    return torch.where(w < 0.33, 0.0, w)


def _check_all(x: Tensor, g: Tensor, mask: Tensor | None) -> None:
    """All four passes against float64, by the rules of each type."""
    channels, over = x.shape[1], [0, *range(2, x.ndim)]
    weight, bias = randn(channels, seed=5).abs() + 0.5, randn(channels, seed=6)
    w = torch.ones(x.shape[0], 1, *x.shape[2:]) if mask is None else mask
    w, wide, wide_g = w.double(), x.double(), g.double()
    sums = ours.moments(x, mask)
    raw = torch.cat([(w * wide).sum(over), (w * wide * wide).sum(over), w.sum().view(1)])
    assert_close(sums, raw, rtol=1e-12, atol=1e-12 * x.numel())
    y, rows = ours.normalize(x, Raw(sums), weight, bias, EPS, None)
    _, wanted_rows = composed.normalize(x, Raw(raw), weight, bias, EPS, None)
    assert_close(rows, wanted_rows, rtol=1e-9, atol=1e-9)
    mean, _, invstd = rows
    xhat = (wide - facing(mean, x)) * facing(invstd, x)
    precision = {F64: 1e-13, F32: 2e-6, BF16: 8e-3, F16: 1e-3}[x.dtype]
    wanted = xhat * facing(weight, x) + facing(bias, x)
    assert_close(y.double(), wanted, rtol=precision, atol=precision * wanted.abs().max().item())
    local, dweight, dbias = ours.backward_sums(g, x, rows, F32, F64)
    wanted_local = torch.stack([wide_g.sum(over), (wide_g * xhat).sum(over)])
    scale = 1 + wanted_local.abs().max().item()
    assert_close(local, wanted_local, rtol=1e-9, atol=1e-9 * scale)
    assert dweight is not None
    assert dbias is not None
    assert_close(dweight.double(), wanted_local[1], rtol=1e-6, atol=1e-6 * scale)
    assert_close(dbias, wanted_local[0], rtol=1e-9, atol=1e-9 * scale)
    dx = ours.backward_input(g, x, rows, weight, local, sums[-1], mask)
    a, b = (facing(total, x) / raw[-1] for total in local)
    wanted_dx = facing(weight * invstd, x) * (wide_g - w * (a + xhat * b))
    largest = wanted_dx.abs().max().item()
    assert_close(dx.double(), wanted_dx, rtol=precision, atol=precision * largest)
    assert y.dtype == dx.dtype == x.dtype
    assert y.stride() == dx.stride() == torch.empty_like(x).stride()


@needs_library
@pytest.mark.parametrize(
    *covering(
        # They choose how a tensor is cut into units of work.
        ("shape", "arrangement", "masked"),
        shape=[*SHAPES, *OF_OWN],
        arrangement=["contiguous", "channels_last", "strided"],
        dtype=[F32, F64, BF16, F16],
        masked=[False, True],
    ),
    ids=str,
)
def test_all_passes(shape, arrangement, dtype, masked):
    if not ours.is_usable(torch.empty(1, dtype=dtype)):
        pytest.skip(f"the compiler knew no {dtype}")
    x, g = (randn(*shape, seed=s) * 2 + s for s in (1, 0))
    if arrangement == "channels_last":
        x, g = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, g))
    elif arrangement == "strided":
        x = torch.cat([x, x], -1)[..., ::2] if x.ndim > 2 else torch.cat([x, x])[::2]
        g = g.movedim(1, -1).contiguous().movedim(-1, 1)
    x, g = x.to(dtype), g.to(dtype)
    _check_all(x, g, _mask(x) if masked else None)


@needs_library
@pytest.mark.parametrize("shape", [(64, 32, 56, 56), (100_000, 40), (4, 8, 30_000)], ids=str)
def test_bits_do_not_depend_on_threads(shape):
    x, g, threads = randn(*shape), randn(*shape, seed=1), torch.get_num_threads()
    seen = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            sums = ours.moments(x, None)
            y, rows = ours.normalize(x, Raw(sums), None, None, EPS, None)
            local, _, _ = ours.backward_sums(g, x, rows, None, None)
            dx = ours.backward_input(g, x, rows, None, local, sums[-1], None)
            seen.append((sums, y, local, dx))
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@needs_library
@pytest.mark.parametrize("arrangement", [torch.contiguous_format, torch.channels_last], ids=str)
def test_variance_far_from_zero(arrangement):
    x = (randn(32, 16, 20, 20) + 1e4).contiguous(memory_format=arrangement)
    batch = Raw(ours.moments(x, None))
    exact = x.double().var((0, 2, 3), correction=0)
    assert ((batch.var - exact) / exact).abs().max() < 1e-6


@needs_library
@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_weight_that_is_none_gives_a_count_of_nan(wrong, dtype):
    mask = torch.ones(4, 1, 5, dtype=dtype)
    mask[2, 0, 3] = wrong
    assert ours.moments(randn(4, 3, 5).to(dtype), mask)[-1].isnan()


@needs_library
def test_padding_of_weight_zero_may_lie_anywhere():
    x, mask = randn(4, 3, 50), torch.ones(4, 1, 50)
    mask[..., 30:] = 0
    clean = ours.moments(x[..., :30].contiguous(), None)
    x[..., 30:] = 1e30
    assert_close(ours.moments(x, mask), clean, rtol=1e-13, atol=0)


def _sums(n: float, mean: float, var: float, channels: int = 3) -> Tensor:
    one = torch.ones(channels, dtype=F64)
    return torch.cat([one * n * mean, one * n * (var + mean**2), one[:1] * n])


def _many_sums(n: float, channels: int) -> Tensor:
    """Sums of channels that differ; rounding leaves some of them a variance below 0."""
    sums, factors = _sums(n, 1.5, 0.0 if n == 1 else 4.0, channels), randn(2 * channels, seed=3)
    sums[:-1] *= 1 + 0.3 * factors.double()
    return sums


@needs_library
@pytest.mark.parametrize("is_std", [False, True])
@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, None])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("n", [0.0, 1.0, 2.5, 8.0, math.nan])
def test_running_statistics_have_the_bits_of_operators(n, dtype, momentum, is_std):
    """Workers with the library and without must have the same buffers."""
    from syncnorm import ops

    def move(own: Any, batch: Moments) -> list[Tensor]:
        mean, var = randn(203, seed=1).to(dtype), randn(203, seed=2).square().to(dtype)
        counter = torch.tensor(3)
        if own is None:
            factor = moments.average_factor(counter, batch, momentum)
            moments.update_running_mean_(mean, batch, factor)
            if is_std:
                ops.renorm.update_running_std_(var, batch, EPS, factor)
            else:
                moments.update_running_var_(var, batch, factor)
        else:
            own.update_running_(mean, var, counter, batch, momentum, EPS, is_std)
        return [mean, var, counter]

    sums = _many_sums(n, 203)
    for got, wanted in zip(move(ours, Raw(sums)), move(None, Raw(sums)), strict=True):
        assert_close(got, wanted, rtol=0, atol=0)


@needs_library
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32], ids=str)
def test_a_counter_of_any_type_counts(dtype):
    counters = torch.zeros(3, dtype=dtype)
    mean, var = torch.zeros(3), torch.ones(3)
    ours.update_running_(mean, var, counters[1], Raw(_sums(8.0, 1.5, 4.0)), None, EPS, False)
    assert counters.tolist() == [0, 1, 0]
    assert_close(mean, torch.full((3,), 1.5))


@needs_library
@pytest.mark.parametrize("n", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("step", [None, 0, 5_000, 20_000, 10**6])
def test_correction_as_by_operators(step, n):
    x = randn(5, 3, 4)
    mean, var = torch.tensor([-3.0, 0.0, 1.0]), torch.tensor([0.1, 1.0, 60.0])
    bounds = (torch.tensor(2.0, dtype=F64), torch.tensor(1.0, dtype=F64))
    if step is not None:
        bounds = Scheduled(torch.tensor(step), RenormSchedule())
    sums = _sums(n, 0.4, 0.0 if n == 1 else 2.0)
    weight = torch.tensor([1.0, 2.0, -1.0])
    y, rows = ours.normalize(x, Raw(sums), weight, None, EPS, Reference(mean, var, bounds))
    z, wanted = composed.normalize(x, Raw(sums), weight, None, EPS, Reference(mean, var, bounds))
    assert_close(rows, wanted, rtol=1e-12, atol=1e-12)
    assert_close(y, z, rtol=1e-5, atol=1e-5)


@needs_library
@pytest.mark.parametrize("updates", [0, 3])
@pytest.mark.parametrize("n", [0.0, 2.5, 8.0, math.inf])
def test_averages_have_the_bits_of_operators(n, updates):
    options, seen = lagged.Lagged(), []
    for rules in (ours, lagged):
        mean, var = randn(203, seed=1).double(), randn(203, seed=2).double().square()
        count, waits = torch.tensor(updates), torch.tensor(int(updates == 0))
        rules.follow_moments_(Raw(_many_sums(n, 203)), mean, var, count, waits, EPS, options)
        gradient, many = randn(2, 203).double(), torch.tensor(updates)
        rules.follow_gradients_(_many_sums(n, 203), gradient, many, options)
        seen.append((mean, var, count, waits, gradient, many))
    for got, wanted in zip(*seen, strict=True):
        assert_close(got, wanted, rtol=0, atol=0)


@needs_library
@pytest.mark.parametrize("max_drift", [0.0, 0.1, 0.35, 2.0])
def test_at_the_very_bound_a_layer_waits_as_by_operators(max_drift):
    """Who waits exchanges: workers with the library and without must decide alike."""
    options, decided = lagged.Lagged(max_drift=max_drift), []
    ratios = [math.exp(sign * 2 * max_drift) for sign in (1, -1)]
    for start in (randn(60).double().square() + 0.01).tolist():
        for ratio in ratios:
            at_bound = (start + EPS) * ratio - EPS
            for near in (math.nextafter(at_bound, way) for way in (-math.inf, at_bound, math.inf)):
                # A count of a power of two, by which nothing is rounded.
                packed = torch.tensor([0.5, 8 * near, 8.0], dtype=F64)
                seen = []
                for rules in (ours, lagged):
                    mean, var = torch.full((1,), 0.5).double(), torch.full((1,), start, dtype=F64)
                    waits, count = torch.tensor(0), torch.tensor(3)
                    rules.follow_moments_(Packed(packed), mean, var, count, waits, EPS, options)
                    seen.append(waits.item())
                assert seen[0] == seen[1], (start, near)
                decided.append(seen[0])
    assert {True, False} == set(decided)


@needs_library
def test_subclasses_of_tensors_go_by_operators():
    class Own(Tensor):
        pass

    x = randn(4, 3, 5)
    assert kernels.fused_for(x) is ours
    assert kernels.fused_for(x, torch.nn.Parameter(randn(3)), None) is ours
    assert kernels.fused_for(x.as_subclass(Own)) is not ours
    assert kernels.fused_for(x, randn(3).as_subclass(Own)) is not ours


@needs_library
def test_a_forked_process_has_threads_of_its_own():
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    code = (
        "import os, torch; from syncnorm.maths.kernels import native\n"
        "torch.set_num_threads(3); x = torch.ones(64, 32, 56, 56)\n"
        "native.moments(x, None); pid = os.fork()\n"
        "sums = native.moments(x, None); assert sums[0] == 64 * 56 * 56\n"
        "os._exit(0) if pid == 0 else None\n"
        "assert os.waitpid(pid, 0)[1] == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_the_library_operators_do_the_work():
    code = (
        "import torch, syncnorm; from syncnorm import native\n"
        "assert native.library() is None, native.load(); print(native.load().detail)\n"
        "layer = syncnorm.SyncBatchNorm(3); x = torch.randn(4, 3, 5, requires_grad=True)\n"
        "layer(x).sum().backward(); assert x.grad is not None"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "SYNCNORM_NATIVE": "0"}, check=True,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "SYNCNORM_NATIVE=0" in ran.stdout


def test_no_compiler_is_an_error_that_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no C compiler"):
        build.build(tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_library_older_than_its_sources_is_not_used(monkeypatch):
    if native.library() is None:
        pytest.skip(native.load().detail)
    monkeypatch.setattr(build, "digest", lambda: "other")
    path = Path(native.library()._name)
    assert "older than its sources" in native._open(path, "x").detail


@needs_library
@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    """The passes again, compiled with the sanitizers of addresses and undefined behaviour."""
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]
    build.build(tmp_path, flags)
    preload = [
        subprocess.check_output([*build.compiler(), f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    env = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "2",
    }
    chosen = "test_all_passes or follow or correction or threads"
    code = (
        "import sys, pathlib, pytest; from syncnorm import native\n"
        f"native.FOLDER = pathlib.Path({str(tmp_path)!r})\n"
        "assert native.library(), native.load()\n"
        f"sys.exit(pytest.main(['-qx', '-p', 'no:cacheprovider', {__file__!r}, '-k', {chosen!r}]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=1500
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert " passed" in ran.stdout


def test_pointers_are_passed_as_the_library_takes_them():
    assert ctypes.sizeof(ours._Reference) == 5 * 8 + 2 * 8 + 3 * 8 + 2 * 4


def _count_operators(kind: str, sync: str) -> list[str]:
    layer = {"norm": SyncBatchNorm, "renorm": SyncBatchRenorm}[kind](16, sync=sync)
    x, g = torch.randn(4, 16, 5, requires_grad=True), torch.randn(4, 16, 5)
    layer(x).backward(g)
    layer.zero_grad(set_to_none=True)
    x.grad = None
    with Operators() as seen:
        layer(x).backward(g)
    return seen.names


@needs_library
@pytest.mark.skipif(ways.refusal() != "", reason=ways.refusal())
@pytest.mark.parametrize(
    ("kind", "sync", "most"), [("norm", "batch", 25), ("norm", "none", 20), ("renorm", "batch", 30)]
)
def test_a_layer_makes_few_operators(pool, kind, sync, most):
    for names in pool(2).run(_count_operators, kind, sync):
        assert 5 < len(names) <= most, names
