"""What a launch does beside the kernel: Triton's search for what it has compiled is made once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

from syncnorm.maths.kernels.triton import launch

DEVICE = torch.device("cuda", 0)


class Kernel:
    """In place of one of Triton's: notes what is searched for, and what is started."""

    def __init__(self) -> None:
        self.searched: list[tuple[Any, ...]] = []
        self.started: list[tuple[Any, ...]] = []

    def fn(self) -> None: ...

    def __getitem__(self, programs: tuple[int]) -> Any:
        def run(*args: Any, num_warps: int, enable_fp_fusion: bool) -> Compiled:
            self.searched.append(args)
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, programs: tuple[int, int, int]) -> Any:
        assert programs[1:] == (1, 1)
        return lambda *args: self.kernel.started.append(args)


@pytest.fixture
def kernel(monkeypatch) -> Kernel:
    monkeypatch.setattr(launch, "_kept", {})
    monkeypatch.setattr(launch, "_IS_KEPT", True)
    return Kernel()


def _start(
    kernel: Kernel,
    x: Tensor | None,
    number: int = 1,
    of: torch.device = DEVICE,
    warps: int = 4,
    programs: int = 3,
) -> None:
    launch._start(kernel, programs, of, (x, None), (number, 2), warps)


def test_what_was_compiled_is_started_by_the_next_tensors(kernel):
    x, y = torch.ones(4), torch.zeros(4, 2).t()
    _start(kernel, x)
    _start(kernel, y)
    assert len(kernel.searched) == 1
    (started,) = kernel.started
    assert started[0] is y
    assert started[1:] == (None, 1, 2)


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.ones(5)[1:]},
        {"x": torch.ones(4, dtype=torch.bfloat16)},
        {"x": None},
        {"number": 16},
        {"of": torch.device("cuda", 1)},
        {"warps": 2},
        {"programs": 4},
    ],
    ids=["alignment", "type", "none", "number", "device", "warps", "programs"],
)
def test_what_would_be_compiled_anew_is_searched_anew(kernel, other):
    first: dict[str, Any] = {"x": torch.ones(4)}
    for _ in range(2):
        _start(kernel, **first)
        _start(kernel, **{**first, **other})
    assert len(kernel.searched) == len(kernel.started) == 2


def test_another_kernel_is_searched(kernel):
    other, x = Kernel(), torch.ones(4)
    for _ in range(2):
        _start(kernel, x)
        _start(other, x)
    for each in (kernel, other):
        assert (len(each.searched), len(each.started)) == (1, 1)


def test_ever_new_sizes_take_no_more_and_more_memory(kernel, monkeypatch):
    monkeypatch.setattr(launch, "_MOST_KEPT", 3)
    for number in range(10):
        _start(kernel, torch.ones(4), number)
    assert len(launch._kept) <= 3


def test_triton_compiles_by_the_type_and_alignment_of_a_tensor_alone():
    """And by whether a number is one that fits: those of a key are the numbers themselves."""
    backend: Any = make_backend(GPUTarget("cuda", 90, 32))

    def compiled_for(value: Any) -> Any:
        return jit.native_specialize_impl(backend, value, False, True, True)

    many = torch.ones(64)
    aligned = [
        many,
        many[16:],
        many.view(8, 8).t(),
        many[::2],
        torch.nn.Parameter(many[:4]),
        many[:0],
    ]
    assert {compiled_for(t) for t in aligned} == {("*fp32", "D")}
    # Triton's rule of 16 is what is kept by.
    for offset in range(1, 4):
        assert compiled_for(many[offset:]) == ("*fp32", "")
    assert compiled_for(many[4:]) == ("*fp32", "D")
    assert compiled_for(many.double())[0] != "*fp32"
