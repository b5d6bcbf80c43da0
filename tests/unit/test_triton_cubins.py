"""The Triton kernels compiled ahead for GPUs that are not here: what ptxas makes of them.

    python -m tests.unit.test_triton_cubins

prints the registers and instructions of each.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402

from syncnorm.maths.kernels.triton import geometry, launch  # noqa: E402
from tests.unit import sass  # noqa: E402
from tests.unit.triton_ahead import options, source  # noqa: E402

WORK = {
    "moments": geometry.SUMS_OF_ONE,
    "normalize": geometry.ELEMENTWISE,
    "backward_sums": geometry.SUMS_OF_TWO,
    "backward_input": geometry.ELEMENTWISE,
}
# Instructions of a thread for a value of x in the loop over tiles, at most.
INSTRUCTIONS = {"moments": 7.0, "normalize": 6.5, "backward_sums": 9.5, "backward_input": 11.0}
# Of a multiprocessor, given out by 8 to a thread.
ALL_REGISTERS = 65536
FORMS = {
    "planes": ((256, 64, 56, 56), False),
    "runs": ((256, 512, 7, 7), False),
    "rows": ((256, 256, 14, 14), True),
    "few rows": ((256, 64, 56, 56), True),
}


def _launches(run: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple[Any, ...], int]]:
    """The kernels of a call, with their arguments and warps, as a card of 132 processors has them."""
    found: list[tuple[Any, tuple[Any, ...], int]] = []

    def note(
        kernel: Any, programs: int, of: torch.device, tensors: Any, numbers: Any, warps: int = 4
    ) -> None:
        found.append((kernel, (*tensors, *numbers), warps))

    with monkeypatch.context() as context:
        context.setattr(launch, "_launch", note)
        context.setattr(launch, "_processors", lambda of: 132)
        run()
    return found


def _compile(kernel: Any, args: tuple[Any, ...], warps: int, arch: int) -> Any:
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(source(kernel, args), target=target, options=options(warps))


def _calls(form: str, dtype: torch.dtype) -> dict[str, Any]:
    shape, is_last = FORMS[form]
    x = torch.empty(shape, dtype=dtype, device="meta")
    if is_last:
        x = x.to(memory_format=torch.channels_last)
    c = torch.empty(shape[1], device="meta")
    rows = torch.empty(3, shape[1], dtype=torch.float64, device="meta")
    batch = torch.empty(2 * shape[1] + 1, dtype=torch.float64, device="meta")
    totals = batch[:-1].view(2, -1)
    return {
        "moments": lambda: launch.moments(x, None),
        "normalize": lambda: launch.normalize(x, batch, True, c, c, 1e-5, *[None] * 6),
        "backward_sums": lambda: launch.backward_sums(x, x, rows, c.dtype, c.dtype),
        "backward_input": lambda: launch.backward_input(x, x, rows, c, totals, batch[-1], None),
    }


class Found(NamedTuple):
    form: int
    registers: int
    local: int
    """Bytes of a thread's local memory, where spills go."""
    ptx: str
    loop: list[str]
    """Instructions of the loop over tiles."""
    instructions: float
    """Those of a thread for a value."""


def _found(name: str, form: str, dtype: torch.dtype, arch: int, patch: Any) -> Found:
    kernel, args, warps = _launches(_calls(form, dtype)[name], patch)[0]
    assert kernel.__name__ == name
    compiled = _compile(kernel, args, warps, arch)
    given = dict(zip(kernel.arg_names, args))
    loop = sass.loop_over_memory(compiled.asm["cubin"])
    values = given["BN"] * given["BJ"] / (32 * warps)
    registers, local = sass.usage(compiled.asm["cubin"])
    return Found(given["FORM"], registers, local, compiled.asm["ptx"], loop, len(loop) / values)


def _room(work: geometry.Work, form: int) -> int:
    """Registers of a thread, such that all programs of a multiprocessor fit."""
    return ALL_REGISTERS // (128 * work.programs[form]) // 8 * 8


def _check(name: str, form: str, dtype: torch.dtype, arch: int, patch: Any) -> None:
    found = _found(name, form, dtype, arch, patch)
    if (arch, name, form) != (100, "backward_input", "runs"):  # there 7 of 8 programs fit
        assert found.registers <= _room(WORK[name], found.form)
    assert found.local == 0, "spills"
    # A reciprocal and a product, which leaves the mean of integers inexact.
    assert "div.full" not in found.ptx
    # x and what has its shape: 16 bytes at once, and never less. Numbers of channels are float64,
    # weight and bias 4 bytes.
    assert "ld.global.v4.b32" in found.ptx
    assert not re.search(r"ld\.global(\.v\d)?\.b16", found.ptx)
    if name in ("normalize", "backward_input"):
        assert "st.global.v4.b32" in found.ptx
        assert not re.search(r"st\.global(\.v2)?\.b(16|32)", found.ptx)
    assert found.instructions <= INSTRUCTIONS[name]
    assert not [each for each in found.loop if re.match("BAR|SHFL|LDS|STS|LDL|STL", each)]
    if name in ("moments", "backward_sums"):
        loads, first_use = sass.loads(found.loop)
        assert len(loads) == 4
        assert loads[-1] < first_use, "a load waits for another"


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("form", ["planes", "rows", "few rows"])
def test_kernels_fit_and_read_16_bytes_at_once(form, name, monkeypatch):
    _check(name, form, torch.bfloat16, 90, monkeypatch)


@pytest.mark.parametrize("form", FORMS)
def test_moments_with_a_mask_fit(form, monkeypatch):
    shape, is_last = FORMS[form]
    x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    if is_last:
        x = x.to(memory_format=torch.channels_last)
    mask = torch.empty(shape[0], 1, *shape[2:], device="meta")
    kernel, args, warps = _launches(lambda: launch.moments(x, mask), monkeypatch)[0]
    registers, local = sass.usage(_compile(kernel, args, warps, 90).asm["cubin"])
    of = dict(zip(kernel.arg_names, args))["FORM"]
    assert registers <= _room(geometry.SUMS_OF_MASKED, of)
    assert local <= 64


@pytest.mark.slow
@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_on_every_architecture(arch, dtype, form, name, monkeypatch):
    _check(name, form, dtype, arch, monkeypatch)


@pytest.mark.parametrize(
    "arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))]
)
def test_all_else_compiles(arch, monkeypatch):
    """Masks, other strides, 64 bits, a correction, and what is per channel."""
    x = torch.empty(8, 6, 40, 40, device="meta", dtype=torch.bfloat16)[:, :, 3:, 1:20]
    far = torch.empty(2**10, 64, 2**9, 2**9, device="meta")
    mask = torch.empty(8, 1, 37, 19, device="meta", dtype=torch.float32)
    c, n = torch.empty(6, device="meta", dtype=torch.bfloat16), torch.empty((), device="meta")
    n, step = n.double(), torch.empty((), device="meta", dtype=torch.int64)
    batch = torch.empty(13, dtype=torch.float64, device="meta")
    rows = torch.empty(9, 6, dtype=torch.float64, device="meta")
    schedule = (3.0, 5.0, 0, 1, 2**33)

    def run() -> None:
        launch.moments(x, mask)
        launch.moments(torch.empty(256, 512, 7, 7, device="meta"), mask[:1, :, :7, :7])
        launch.moments(far, None)
        launch.moments(x.double(), mask)
        launch.normalize(x, batch, False, c, None, 1e-5, c, c, n, n, None, None)
        launch.normalize(x, batch, True, None, c, 1e-5, c, c, None, None, step, schedule)
        launch.backward_sums(x.transpose(2, 3), x.transpose(2, 3), rows, c.dtype, None)
        launch.backward_input(n.expand_as(x), x, rows, c, rows[:2], None, mask)
        launch.update_running_(c, c, step, batch, True, None, 1e-3, True)
        launch.update_running_(c, c.double(), None, batch, False, 0.1, 1e-3, False)
        waits, averages = torch.empty((), device="meta", dtype=torch.int64), batch[:6]
        launch.follow_moments_(batch, True, averages, averages, step, waits, 1e-3, 0.3, 2.0, 0.1)
        launch.follow_moments_(batch, False, averages, averages, step, waits, 1e-3, 0.3, 2.0, 0.1)
        launch.follow_gradients_(batch, batch[:12].view(2, 6), step, 0.1)
        launch.compare_identity_(launch.add_identity(batch, 30, 2**37), 13, 2**37)

    for kernel, args, warps in _launches(run, monkeypatch):
        _, local = sass.usage(_compile(kernel, args, warps, arch).asm["cubin"])
        assert local <= 64


if __name__ == "__main__":
    for arch in (80, 90, 100):
        for dtype in (torch.bfloat16, torch.float32):
            for name in WORK:
                for form in FORMS:
                    found = _found(name, form, dtype, arch, pytest.MonkeyPatch())
                    print(
                        f"sm_{arch} {str(dtype)[6:]:8} {name:14} {form:8} "
                        f"{found.registers:3} registers, {found.instructions:4.1f} instructions"
                    )
