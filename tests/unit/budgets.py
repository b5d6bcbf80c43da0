"""What eager code costs on a CUDA device: a log of its operators, taken without a device.

    with Log() as log:
        y = layer(torch.empty(32, 256, 14, 14, device="meta"))
    log.launches, log.traffic(x), log.names, log.largest, log.peak

A value read on the host raises on meta tensors. Also counted is what one call does inside where
the log cannot see it; each rule below names the source in torch 2.13, of CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_HALF = (torch.bfloat16, torch.float16)
_ALLOCATIONS = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "_reshape_alias",
}
# They write their first argument without reading it.
_OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_"}
_REDUCTIONS = {"sum", "mean", "var", "var_mean", "std", "prod", "linalg_vector_norm", "norm"}
_JOINS = {"cat", "stack"}
# native_batch_norm in evaluation mode copies the mean and makes 1 / std in launches of their own:
# native/cuda/Normalization.cu, batch_norm_cuda_out.
_MORE_LAUNCHES = {"native_batch_norm": 2}


class Log(TorchDispatchMode):
    """The operators on meta tensors (or on those of `device`) that would launch a kernel."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.names: list[str] = []
        """The operators, one for each call that launches; `launches` may be more."""
        self.launches = 0
        self.bytes = 0
        """Read and written. An expanded tensor counts as what it lies on."""
        self.largest = 0
        """Bytes of the largest tensor made, results included."""
        self.peak = 0
        """Bytes of all tensors made and alive at one time, results included."""
        self._device = device
        self._alive: list[tuple[StorageWeakRef, int]] = []

    def traffic(self, x: Tensor) -> float:
        """Bytes read and written, in those of x."""
        return self.bytes / x.nbytes

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        outs = [t for a in func._schema.arguments if a.is_out for t in _tensors(kwargs.get(a.name))]
        inputs = [t for t in _tensors((args, kwargs)) if all(t is not out for out in outs)]
        result = func(*args, **kwargs)
        results = _tensors(result)
        if func is torch.ops.aten.native_batch_norm_backward.default:
            # Its meta kernel makes gradients that are not asked for, too; no device does.
            results = [t for t, wanted in zip(result, args[-1], strict=True) if wanted]
        if func.is_view or not any(t.device.type == self._device for t in [*inputs, *results]):
            return result
        name = func.name().split("::")[1].split(".")[0]
        hidden = _hidden_copies(name, inputs, [*outs, *results])
        self._keep([*inputs, *outs], results, sum(hidden))
        if name in _ALLOCATIONS:
            return result
        self.names.append(name)
        self.launches += 1 + len(hidden) + _MORE_LAUNCHES.get(name, 0)
        if name in _JOINS and any(t.dtype != results[0].dtype for t in inputs):
            # native/cuda/Shape.cu, cat_out_cuda: a copy for each where types differ.
            self.launches += len(inputs) - 1
        read = inputs[1:] if name in _OVERWRITES else inputs
        # Each hidden copy is written, and read in place of the input, which was read for it.
        self.bytes += sum(map(size_of, [*read, *results])) + 2 * sum(hidden)
        return result

    def _keep(self, given: list[Tensor], results: list[Tensor], hidden: int) -> None:
        self._alive = [(ref, size) for ref, size in self._alive if not ref.expired()]
        known = {t.untyped_storage()._cdata for t in given}
        for t in results:
            storage = t.untyped_storage()
            if storage._cdata not in known:
                known.add(storage._cdata)
                self._alive.append((StorageWeakRef(storage), storage.nbytes()))
                self.largest = max(self.largest, storage.nbytes())
        self.largest = max(self.largest, hidden)
        self.peak = max(self.peak, hidden + sum(size for _, size in self._alive))


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def size_of(t: Tensor) -> int:
    """Bytes of the elements that t has, each once."""
    count = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * t.element_size()


def _hidden_copies(name: str, inputs: list[Tensor], results: list[Tensor]) -> list[int]:
    """Bytes of each copy that an operator makes of an input for itself."""
    if name in _REDUCTIONS and inputs and results:
        # ReduceOpsUtils.h, make_reduction: the input is copied to the type that is added in, unless
        # that is float32 and the input of a half type.
        x, dtype = inputs[0], results[0].dtype
        is_free = x.dtype == dtype or (x.dtype in _HALF and dtype == torch.float32)
        return [] if is_free else [x.numel() * results[0].element_size()]
    if name == "native_batch_norm_backward":
        # Normalization.cuh, batch_norm_backward_reduce_cuda_template reshapes to (N, C, L).
        return [t.nbytes for t in inputs[:2] if t.ndim > 2 and not _is_viewable(t)]
    return []


def _is_viewable(t: Tensor) -> bool:
    """True if the dimensions behind the channels are one in memory."""
    try:
        t.view(t.shape[0], t.shape[1], -1)
    except RuntimeError:
        return False
    return True
