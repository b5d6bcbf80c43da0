"""What the kernels of a device would do, done by those of the CPU on the same memory.

torch finds a function of ours in place of each of its kernels for CUDA. Triton's kernels are
compiled and launched, into the void, and then run by its interpreter.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from drills.stand_in.batch_norm import OPERATORS

HOST = torch.device("cpu")
# Their kernels for CUDA do no more than allocate memory or look at a tensor from another side; or
# there are none on a CPU.
_KEPT = {
    "_efficientzerotensor", "_pin_memory", "_reshape_alias", "_to_copy", "alias", "as_strided",
    "empty", "empty_strided", "is_pinned", "record_stream", "resize_", "resize_as_", "set_",
    "unfold", "view",
}  # fmt: skip
_KEPT_KINDS = ("_cudnn", "cudnn", "miopen", "_sparse", "sparse", "_scaled_dot", "_flash")
# The size of their result is known on the device alone.
_WAITING = {
    "_unique", "_unique2", "equal", "masked_select", "nonzero", "repeat_interleave", "unique_dim",
    "unique_consecutive",
}  # fmt: skip
_INDEXING = {"_index_put_impl_", "index", "index_put_"}
_library: list[torch.library.Library] = []
# Few, since the interpreter runs one program after the other.
_PROCESSORS = 2


def install() -> None:
    """Have this process compute on its CPU what it computes on CUDA."""
    library = torch.library.Library("aten", "IMPL")
    _library.append(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels that are replaced
        own = {"copy_": _copy_, "_local_scalar_dense": _read, "var.correction_out": _var_into}
        for function in OPERATORS:
            operator = getattr(torch.ops.aten, function.__name__).default
            own[function.__name__] = _on_host(operator, function)
        for name in torch._C._dispatch_get_all_op_names():
            operator = _replaceable(name)
            if operator is not None:
                own.setdefault(name.removeprefix("aten::"), _on_host(operator))
        for name, function in own.items():
            library.impl(name, function, "CUDA")
    torch.backends.cudnn.enabled = False
    _Graph.install()
    _install_triton()


def _replaceable(name: str) -> Any:
    """The operator of a name, if it has a kernel for CUDA that computes; else None."""
    space, _, full = name.partition("::")
    base, _, overload = full.partition(".")
    if space != "aten" or base in _KEPT or base.startswith(_KEPT_KINDS):
        return None
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
        return None
    packet = getattr(torch.ops.aten, base)
    if (overload or "default") not in packet.overloads():
        return None
    operator = getattr(packet, overload or "default")
    is_view = any(r.alias_info and not r.alias_info.is_write for r in operator._schema.returns)
    return None if is_view else operator


def on_host(t: Tensor) -> Tensor:
    """A tensor of the CPU in the memory of one of the device."""
    storage = t.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=HOST)
    memory = torch._C._construct_storage_from_data_pointer(
        storage.data_ptr(), HOST, storage.nbytes()
    )
    seen = torch.empty(0, dtype=t.dtype, device=HOST)
    return torch.ops.aten.set_.source_Storage_storage_offset(
        seen, memory, t.storage_offset(), t.shape, t.stride()
    )


def _on_device(t: Any, device: torch.device) -> Any:
    if not isinstance(t, Tensor):
        return t
    result = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    on_host(result).copy_(t)
    return result


def _resize(to: Any, host: Any) -> None:
    """Give outputs of the device the shapes that those of the host were given, and what is in them."""
    for t, h in zip(to, host, strict=True) if isinstance(to, list) else [(to, host)]:
        if t.shape != h.shape:
            on_host(t.resize_(h.shape)).copy_(h)


class _Graph:
    """What a graph of CUDA holds: each operator that was called, to be called again."""

    recording: list[Callable[[], object]] | None = None
    """The calls of the graph that is being captured."""

    @classmethod
    def install(cls) -> None:
        kind, calls = torch.cuda.CUDAGraph, weakref.WeakKeyDictionary()
        begin, end, replay = kind.capture_begin, kind.capture_end, kind.replay

        def capture_begin(graph: Any, *args: Any, **options: Any) -> None:
            begin(graph, *args, **options)
            cls.recording = []

        def capture_end(graph: Any) -> None:
            calls[graph], cls.recording = cls.recording, None
            end(graph)

        def replay_all(graph: Any) -> None:
            replay(graph)
            for call in calls[graph]:
                call()

        kind.capture_begin, kind.capture_end, kind.replay = capture_begin, capture_end, replay_all

    @classmethod
    def run(cls, call: Callable[[], object]) -> None:
        """Call, and call again whenever the graph that is being captured is replayed."""
        call()
        if cls.recording is not None:
            cls.recording.append(call)


def _wait(what: object) -> None:
    """Say that the host would wait for the device, to whoever has asked torch to do so."""
    if _Graph.recording is not None:
        raise RuntimeError(f"{what}: not permitted while a graph is captured")
    said = f"called a synchronizing CUDA operation: {what}"
    mode = torch.cuda.get_sync_debug_mode() if torch.cuda.is_initialized() else 0
    if mode == 2:
        raise RuntimeError(said)
    if mode == 1:
        warnings.warn(said, stacklevel=3)


def _on_host(operator: Any, kernel: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The operator for tensors of the device, by its kernel for a CPU, or by another one."""
    kernel = kernel or operator
    arguments, returns = operator._schema.arguments, operator._schema.returns
    base = operator._schema.name.removeprefix("aten::")
    written = [(i, a) for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    tensors = {a.name for a in arguments if str(a.type) in ("Tensor", "Optional[Tensor]")}
    names, outs = [a.name for a in arguments], {a.name for a in arguments if a.is_out}

    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        # A number in place of a tensor: its type must not decide that of the result.
        for name in tensors & given.keys():
            if isinstance(given[name], (int, float)):
                kind = torch.float64 if type(given[name]) is float else None
                given[name] = torch.tensor(given[name], dtype=kind, device=HOST)
        moved = _Moved(operator, base)
        host = tree_map(moved.to_host, given)
        if host.get("pin_memory"):
            host["pin_memory"] = None
        by_place = [host.pop(name) for name in names[: len(args)]]
        options = dict(host)
        result = kernel(*by_place, **options)
        host |= dict(zip(names, by_place, strict=False))
        for name in outs & given.keys():
            _resize(given[name], host[name])
        device = moved.device or torch.device("cuda", torch.cuda.current_device())

        def back(value: Any, kind: Any) -> Any:
            if kind.alias_info:
                (name,) = (
                    a.name
                    for _, a in written
                    if a.alias_info.before_set == kind.alias_info.before_set
                )
                return given[name]
            return tree_map(lambda t: _on_device(t, device), value)

        if len(returns) == 1:
            given_back = back(result, returns[0])
        else:
            given_back = tuple(map(back, result, returns)) if returns else None
        if _Graph.recording is not None:
            made = [on_host(t) for t in tree_leaves(given_back) if isinstance(t, Tensor)]

            def again() -> None:
                results = tree_leaves(kernel(*by_place, **options))
                for t, new in zip(made, (r for r in results if isinstance(r, Tensor)), strict=True):
                    if t.data_ptr() != new.data_ptr():
                        t.copy_(new)

            _Graph.recording.append(again)
        return given_back

    return call


class _Moved:
    """The arguments of one call, given to the host."""

    def __init__(self, operator: Any, base: str) -> None:
        self.device: torch.device | None = None
        self._operator = operator
        self._is_indexing = base in _INDEXING
        if base in _WAITING:
            _wait(operator)

    def to_host(self, value: Any) -> Any:
        if isinstance(value, torch.Generator):
            return _generator() if value.device.type == "cuda" else value
        if isinstance(value, torch.device):
            if value.type != "cuda":
                return value
            self.device = torch.device("cuda", value.index or 0)
            return HOST
        if not isinstance(value, Tensor):
            return value
        if self._is_indexing and (not value.is_cuda or value.dtype == torch.bool):
            _wait(f"{self._operator} by a mask, or by an index of the host")
        elif not value.is_cuda and value.ndim:
            raise RuntimeError(f"{self._operator}: a tensor is on {value.device}")
        if not value.is_cuda:
            return value
        if value.ndim and self.device not in (None, value.device):
            raise RuntimeError(f"{self._operator}: tensors on {self.device} and {value.device}")
        self.device = value.device
        return on_host(value)


_generators = threading.local()


def _generator() -> torch.Generator:
    if not hasattr(_generators, "own"):
        _generators.own = torch.Generator(HOST)
    return _generators.own


def _copy_(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if to.device.type != source.device.type and not non_blocking and to.numel():
        _wait(f"a copy from {source.device} to {to.device}")
    host, other = (on_host(t) if t.is_cuda else t for t in (to, source))
    _Graph.run(lambda: host.copy_(other))
    return to


def _read(t: Tensor) -> Any:
    _wait("a value is read")
    return torch.ops.aten._local_scalar_dense(on_host(t))


def _var_into(x: Tensor, dim: Any = None, *, out: Tensor, **options: Any) -> Tensor:
    """The variance in the type of `out`: a CPU gives no single number of a half type in float32."""
    x, host = on_host(x), on_host(out)

    def compute() -> None:
        host.copy_(torch.var(x.to(host.dtype), dim, **options))

    _Graph.run(compute)
    return out


def _install_triton() -> None:
    from syncnorm.maths.kernels import triton

    if os.environ.get("STAND_IN_TRITON") == "0":
        triton.is_usable = lambda device: False
        return
    from syncnorm.maths.kernels.triton import launch
    from tests.unit.triton_interpreter import interpreted, interpreted_library

    launch_compiled, lock = launch._launch, threading.RLock()
    with interpreted():
        interpreted_modules = {
            module.__name__: module for module in (launch.device, launch.channels)
        }

    def launch_both(
        kernel: Any, programs: int, of: torch.device, tensors: Any, numbers: Any, warps: int = 4
    ) -> None:
        args = (*tensors, *numbers)
        with lock:
            if of.type == "cuda":
                launch_compiled(kernel, programs, of, tensors, numbers, warps)
            module = interpreted_modules[kernel.fn.__module__]
            host = [on_host(a) if isinstance(a, Tensor) and a.is_cuda else a for a in args]

            def interpret() -> None:
                with interpreted_library():
                    getattr(module, kernel.fn.__name__)[(programs,)](*host, num_warps=warps)

            _Graph.run(interpret)

    launch._launch = launch_both
    launch._processors = lambda of: _PROCESSORS
