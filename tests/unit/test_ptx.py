"""The PTX of the Triton kernels, with all threads of a block: against float64, and for what the threads
do to each other and where they read and write.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402

from syncnorm.maths.kernels.triton import launch  # noqa: E402
from tests.covering import covering  # noqa: E402
from tests.unit import test_triton as formulas  # noqa: E402
from tests.unit.kernel_inputs import poison, randn  # noqa: E402
from tests.unit.ptx import launcher, run  # noqa: E402
from tests.unit.ptx_memory import PtxError  # noqa: E402
from tests.unit.test_kernels import _arrange  # noqa: E402
from tests.unit.triton_ahead import Ptx  # noqa: E402


@pytest.fixture
def on_ptx(monkeypatch) -> Callable[..., None]:
    """Have launches run PTX: `on_ptx(arch, processors, change)`."""
    poison(monkeypatch)

    def use(arch: int = 90, processors: int = 132, change: Any = lambda code: code) -> None:
        monkeypatch.setattr(launch, "_launch", launcher(arch, change))
        monkeypatch.setattr(launch, "_processors", lambda of: processors)

    return use


def _laid_out(x: Tensor, how: str) -> Tensor:
    if how == "cropped":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    if how == "odd start":
        return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)
    if how == "expanded":  # not to channels of one value each, whose gradient is all rounding
        return (x[:1] if x.ndim > 2 else x[:, :1]).expand_as(x)
    return _arrange(x, how)


@pytest.mark.parametrize(
    *covering(
        shape=[(4, 6, 7, 7), (3, 5, 20, 21), (64, 8), (2, 3, 100, 100)],
        how=["contiguous", "channels_last", "cropped", "odd start", "expanded"],
        dtype=[torch.float32, torch.bfloat16, torch.float16, torch.float64],
        masked=[False, True],
        processors=[1, 132],
        arch=[80, 90],
    ),
    ids=str,
)
def test_passes_over_a_tensor(shape, how, dtype, masked, processors, arch, on_ptx):
    on_ptx(arch, processors)
    x = _laid_out((randn(*shape) * 2 + 3).to(dtype), how)
    g = _laid_out(randn(*shape, seed=1).to(dtype), "contiguous" if how == "channels_last" else how)
    mask = None
    if masked:
        mask = _laid_out(formulas._rand(shape[0], 1, *shape[2:]).to(dtype), how)
    formulas._check_all(x, g, mask)


CHECKS = {
    "bounds of r and d": partial(
        formulas.test_the_rules_of_a_statistic_are_those_of_moments, 6.0, True
    ),
    "gradients with a correction": formulas.test_gradients_with_a_correction,
    "running statistics": partial(
        formulas.test_running_statistics_follow_as_they_do_elsewhere, 6.0, 0.1, True
    ),
    "cumulative statistics": partial(
        formulas.test_running_statistics_follow_as_they_do_elsewhere, 6.0, None, False
    ),
    "averages of moments": partial(
        formulas.test_averages_of_moments_follow_as_they_do_elsewhere, True, 6.0, 1e3, 3
    ),
    "identity of a message": partial(formulas.test_messages_carry_their_identity, 512, 700),
    "identity of a sum": partial(formulas.test_sums_of_other_messages_are_nan, 2**38 - 1, 2**15, 0),
    "another message": partial(formulas.test_sums_of_other_messages_are_nan, 2**38 - 1, 2**15, -1),
    "no identity": partial(formulas.test_sums_of_other_messages_are_nan, 2**38 - 1, 1, math.inf),
    "averages of gradients": partial(
        formulas.test_averages_of_gradients_follow_as_they_do_elsewhere, 6.0, 3
    ),
    "large means": partial(
        formulas.test_variance_at_large_means, (8, 2, 56, 56), "contiguous", True
    ),
    "large means of rows": partial(
        formulas.test_variance_at_large_means, (4, 8, 28, 28), "channels_last", True
    ),
    "integers": partial(
        formulas.test_the_mean_of_integers_is_exact_however_they_are_sharded,
        "contiguous",
        torch.float32,
    ),
}


@pytest.mark.parametrize(("arch", "name"), list(zip(itertools.cycle([80, 90]), CHECKS)))
def test_what_the_interpreter_is_asked_holds(name, arch, on_ptx):
    """Products that are added to are fused here, as they are on a GPU."""
    on_ptx(arch)
    CHECKS[name]()


# What must be reported: defects in these kernels, in others, and in hand-written ones.

X = randn(2, 3, 100, 100).bfloat16()
C = randn(200).double()
RUNS = {
    "moments": lambda: launch.moments(X[:1, :, :, :50].contiguous(), None),
    "normalize": lambda: launch.normalize(X, C[:7], True, None, None, 1e-5, *[None] * 6),
    "update_running": lambda: launch.update_running_(
        randn(99), randn(99), torch.tensor(3), C[:199], True, 0.1, 1e-5, False
    ),
}
SOME = r"mov.u32 %r0, %tid.x;\nsetp.lt.u32 %p0, %r0, 40;\n@%p0 \1"


MUTANTS = {
    "no barrier": ("moments", r"bar\.sync\s+0;", "", "reads byte .* no barrier between"),
    "nothing written": ("moments", r"(?:@%p\d+ )?st\.shared.*", "", "that nobody has written"),
    "beyond shared memory": ("moments", r"(st\.shared\S*\s+\[\s*\w*%?\w+)[^]]*", r"\1 + 65536", "leaves the .* of shared"),
    "a load, moved by an element": ("normalize", r"(ld\.global\.v4\.b32 .*) \+ 0 \]", r"\1 + 2 ]", "takes 16 bytes"),
    "a load without its mask": ("normalize", r"@%p\d+ (ld\.global\.v4)", r"\1", "leaves the .* of argument 0"),
    "a store, moved by a vector": ("normalize", r"(st\.global\.v4.*) \+ 0 \]", r"\1 + 16 ]", "leaves the .* of argument 1"),
    "a store by all": ("update_running", r"@%p\d+ (st\.global\.b64)", r"\1", "two threads write argument 2"),
    "a barrier for some": ("moments", r"(bar\.sync\s+0;)", SOME, "bar.sync .* not reached by all"),
    "a shuffle for some": ("moments", r"(shfl\.sync)", SOME, "shfl.* not reached by all"),
    "another rounding": ("moments", r"add\.f32", "add.rz.f32", "add.rz.f32 .* is not known here"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_defect_is_reported(name, on_ptx):
    kernel, pattern, by, words = MUTANTS[name]

    def change(code: Ptx) -> Ptx:
        text, found = re.subn(pattern, by, code.text)
        assert found
        return code._replace(text=text)

    on_ptx()
    RUNS[kernel]()
    on_ptx(change=change)
    with pytest.raises(PtxError, match=rf"^{kernel}, line \d+: .*(?:{words})"):
        RUNS[kernel]()


def test_code_for_an_aligned_tensor_does_not_fit_an_odd_one(on_ptx):
    codes: list[Ptx] = []
    on_ptx(change=lambda code: codes.append(code) or code)
    launch.moments(X, None)
    odd = _laid_out(X, "odd start")
    launch.moments(odd, None)
    on_ptx(change=lambda code: codes[0])
    with pytest.raises(PtxError, match=r"moments, .* takes 16 bytes of argument 0"):
        launch.moments(odd, None)


@triton.jit
def turned(x, y, IS_ORDERED: tl.constexpr):
    i = tl.arange(0, 128)
    tl.store(x + i, i)
    if IS_ORDERED:
        tl.debug_barrier()
    tl.store(y + i, tl.load(x + 127 - i))


@triton.jit
def counted(counter, IS_ONES_OWN: tl.constexpr):
    place = counter + (tl.program_id(0) if IS_ONES_OWN else 0)
    number = tl.load(place)
    tl.debug_barrier()
    if tl.program_id(0) == 1:
        tl.store(place, number + 1)


@triton.jit
def overlapping(x, STEP: tl.constexpr):
    tl.store(x + tl.program_id(0) * STEP + tl.arange(0, 128), tl.arange(0, 128))


def _run(kernel: Any, x: Tensor, number: int) -> None:
    launcher(90)(kernel, 2, x.device, (x,), (number,))


def test_threads_that_wait_for_no_one():
    x, y = torch.zeros(2, 128, dtype=torch.int32)
    launcher(90)(turned, 1, x.device, (x, y), (True,))
    assert torch.equal(y, x.flip(0))
    with pytest.raises(PtxError, match=r"^turned, .* reads byte .* of it with no barrier between"):
        launcher(90)(turned, 1, x.device, (x, y), (False,))


def test_programs_that_share_a_place():
    counter = torch.zeros(2, dtype=torch.int64)
    _run(counted, counter, True)
    assert counter.tolist() == [0, 1]
    with pytest.raises(PtxError, match=r"writes byte 0 .* read by thread .* of another program, 0"):
        _run(counted, counter, False)
    x = torch.zeros(256, dtype=torch.int32)
    _run(overlapping, x, 128)
    with pytest.raises(PtxError, match=r"writes byte 508 .* written by .* of another program, 0"):
        _run(overlapping, x, 127)


TURNS = """
.visible .entry turns(.param .u64 turns_param_0)
{
    .reg .pred %p<2>;
    .reg .b32 %r<4>;
    .reg .b64 %rd<3>;
    ld.param.b64 %rd1, [turns_param_0];
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %rd2, %r1, 4, %rd1;
    mov.b32 %r2, 0;
$next:
    add.s32 %r2, %r2, 1;
    mov.b32 %r3, %r2;
    setp.le.s32 %p1, %r2, %r1;
    @%p1 bra $next;
    bar.sync 0;
    st.global.b32 [%rd2 + 0], {%r3};
    ret;
}
"""


def test_threads_may_go_ways_of_their_own_but_not_through_shuffles():
    out, code = torch.zeros(64, dtype=torch.int32), Ptx("turns", TURNS, 0, 2)
    run(code, [out], 1)
    assert torch.equal(out, torch.arange(1, 65, dtype=torch.int32))
    for crossed in ("shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;", "bar.warp.sync -1;", "bar.sync 0;"):
        text = TURNS.replace("mov.b32 %r3, %r2;", crossed)
        with pytest.raises(PtxError, match=r"turns, line 13: .* is not reached by all"):
            run(code._replace(text=text), [out], 1)
