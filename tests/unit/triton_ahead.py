"""The Triton kernels compiled for a GPU that is not here. Needs Triton."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Ptx(NamedTuple):
    kernel: str
    text: str
    shared: int
    """Bytes of shared memory."""
    warps: int


def source(kernel: Any, args: tuple[Any, ...]) -> ASTSource:
    """What is compiled for these arguments, as Triton specialises on them at a launch."""
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    return ASTSource(kernel, signature, constants, attributes)


def options(warps: int) -> dict[str, Any]:
    """Those of `launch._launch`."""
    return {"num_warps": warps, "enable_fp_fusion": True}


_made: dict[tuple[str, int, int], Ptx] = {}


def ptx(kernel: Any, args: tuple[Any, ...], warps: int, arch: int) -> Ptx:
    """The PTX of a launch; kept, and not assembled."""
    of = source(kernel, args)
    key = of.hash(), warps, arch
    if key not in _made:
        target = GPUTarget("cuda", arch, 32)
        backend: Any = make_backend(target)
        parsed = backend.parse_options(options(warps))
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        stages: dict[str, Any] = {}
        backend.add_stages(stages, parsed, of.language)
        of_backend = backend.get_codegen_implementation(parsed), backend.get_module_map()
        made = of.make_ir(target, parsed, *of_backend, context)
        metadata = {"target": target, **vars(parsed)}
        for stage in ("ttir", "ttgir", "llir", "ptx"):
            made = stages[stage](made, metadata)
        _made[key] = Ptx(of.name, made, metadata["shared"], warps)
    return _made[key]
