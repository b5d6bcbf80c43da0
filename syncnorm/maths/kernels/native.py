"""A normalisation layer on a CPU, in C: the passes over x, and with each all (C,)-sized work.

The functions are those of `syncnorm.maths.kernels.composed`, in one foreign call each, on as many
threads as torch is set to use. Contiguous tensors and those whose channels vary fastest are taken
as they are, others are copied. The bits do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int, c_int64, c_long, c_void_p
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from syncnorm import native
from syncnorm.maths.kernels import layout
from syncnorm.maths.kernels.arguments import Reference, Scheduled, mark_written
from syncnorm.maths.moments import Moments

if TYPE_CHECKING:
    from syncnorm.maths.lagged import Lagged

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_PLAIN = (Tensor, torch.nn.Parameter)
_ROWS, _CORRECTED_ROWS = 3, 9
_X = (c_int, c_long, c_long, c_long)  # type, outer, channels, inner
_SIGNATURES = {
    "types": (c_int,),
    "moments": (c_int, c_void_p, *_X, c_void_p, c_void_p, c_int),
    "normalize": (
        c_int, c_void_p, c_void_p, *_X, c_void_p, c_int, c_void_p, c_int, c_void_p, c_int, c_double,
        c_void_p, c_void_p, c_int,
    ),
    "backward_sums": (
        c_int, c_void_p, c_void_p, *_X, c_void_p, c_int, c_void_p, c_void_p, c_int, c_void_p, c_int, c_int,
    ),
    "backward_input": (
        c_int, c_void_p, c_void_p, c_void_p, *_X, c_void_p, c_void_p, c_int, c_void_p, c_int, c_void_p,
        c_void_p, c_int,
    ),
    "update_running": (
        c_int, c_void_p, c_int, c_void_p, c_int, c_void_p, c_void_p, c_int, c_long, c_double, c_double, c_int,
    ),
    "follow_moments": (
        c_int, c_void_p, c_int, c_long, c_void_p, c_void_p, c_void_p, c_void_p, *(c_double,) * 4,
    ),
    "follow_gradients": (None, c_void_p, c_long, c_void_p, c_void_p, c_double),
}  # fmt: skip


class _Reference(ctypes.Structure):
    """The `reference` of kernels.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("running_mean", "running_var", "r_max", "d_max", "step")),
        *((name, c_double) for name in ("r_end", "d_end")),
        *((name, c_int64) for name in ("warmup", "r_steps", "d_steps")),
        *((name, c_int) for name in ("mean_type", "var_type")),
    ]


@cache
def _functions() -> Any:
    return native.functions("syncnorm_", _SIGNATURES)


@cache
def _types() -> set[torch.dtype]:
    """The types that the library knows; none without the library."""
    functions = _functions()
    known = 0 if functions is None else functions.types()
    return {dtype for dtype, number in _TYPES.items() if number < known}


def is_usable(*tensors: Tensor | None) -> bool:
    """True if the native library is there, and the tensors are in memory and of kinds it knows.

    A tensor that torch keeps with the other sign is of none, such as an imaginary part of a
    conjugate.
    """
    types = _types()
    # A loop: a generator would be a Python call for each tensor, in every forward.
    for t in tensors:
        if t is not None and not (
            type(t) in _PLAIN and t.dtype in types and t.is_cpu and not t.is_neg()
        ):
            return False
    return bool(types)


def _no_memory(name: str) -> MemoryError:
    return MemoryError(f"{name} of the native kernels found no memory for its sums")


def _dense(x: Tensor, *others: Tensor) -> tuple[tuple[int, int, int, int], Any]:
    """The type and sizes of x in C, and a list of x and the others in one dense layout.

    That of x if it is dense; copied is what differs from it.
    """
    n, c, *_ = x.shape
    if not x.is_contiguous() and layout.is_rows(x):
        return (_TYPES[x.dtype], x.numel() // c, c, 1), [x, *map(_rows_of, others)]
    sizes = _TYPES[x.dtype], n, c, x.numel() // (n * c)
    return sizes, [*map(Tensor.contiguous, (x, *others))]


def _rows_of(t: Tensor) -> Tensor:
    """t with channels that vary fastest; copied only if they do not."""
    return t if layout.is_rows(t) else t.movedim(1, -1).contiguous().movedim(-1, 1)


def _weights(mask: Tensor, x: Tensor) -> tuple[Tensor, int]:
    """The mask in the type of the arithmetic, with its samples and places in order; its pointer."""
    w = mask.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()
    return w, w.data_ptr()


def _rows(*vectors: Tensor | None) -> list[int | None]:
    """Pointer and type of each (C,) tensor."""
    flat: list[int | None] = []
    for t in vectors:
        flat += (None, 0) if t is None else (t.data_ptr(), _TYPES[t.dtype])
    return flat


def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """Raw sums of one worker, shape (2C+1,), float64.

    The count is NaN where a weight is negative or not finite.
    """
    sizes, (x,) = _dense(x)
    _kept, w = (None, None) if mask is None else _weights(mask, x)
    sums = torch.empty(2 * sizes[2] + 1, dtype=torch.float64, device="cpu")
    threads = torch.get_num_threads()
    if _functions().moments(x.data_ptr(), *sizes, w, sums.data_ptr(), threads):
        raise _no_memory("moments")
    return sums


def normalize(
    x: Tensor,
    batch: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    reference: Reference | None,
) -> tuple[Tensor, Tensor]:
    """y, in the type and layout of x, and rows: (3, C), or (9, C) with a reference."""
    given = x
    sizes, (x,) = _dense(x)
    y = torch.empty_like(x)
    numbers, is_raw = batch.packed
    weight = weight if weight is None else weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    to, kept = (None, ()) if reference is None else _reference(reference)
    rows = torch.empty(
        _ROWS if to is None else _CORRECTED_ROWS, sizes[2], dtype=torch.float64, device="cpu"
    )
    failed = _functions().normalize(
        x.data_ptr(), y.data_ptr(), *sizes, numbers.data_ptr(), is_raw,
        *_rows(weight, bias), eps, rows.data_ptr(), to, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise _no_memory("normalize")
    del kept
    return (y if x is given else torch.empty_like(given).copy_(y)), rows


def _reference(reference: Reference) -> tuple[Any, tuple[Tensor, ...]]:
    """A pointer to the reference, and what it points to."""
    mean, var, bounds = reference
    mean, var = mean.contiguous(), var.contiguous()
    of_types = _TYPES[mean.dtype], _TYPES[var.dtype]
    if isinstance(bounds, Scheduled):
        step, ramps = bounds
        step = step.to("cpu", torch.int64)
        to = _Reference(
            mean.data_ptr(), var.data_ptr(), None, None, step.data_ptr(), ramps.r_max, ramps.d_max,
            ramps.warmup_steps, ramps.r_steps, ramps.d_steps, *of_types,
        )  # fmt: skip
        return ctypes.byref(to), (mean, var, step)
    r_max, d_max = (bound.to("cpu", torch.float64) for bound in bounds)
    to = _Reference(
        mean.data_ptr(), var.data_ptr(), r_max.data_ptr(), d_max.data_ptr(), None, 0.0, 0.0, 0, 0, 0,
        *of_types,
    )  # fmt: skip
    return ctypes.byref(to), (mean, var, r_max, d_max)


def update_running_(
    running_mean: Tensor,
    running_var: Tensor,
    counter: Tensor | None,
    batch: Moments,
    momentum: float | None,
    eps: float,
    is_std: bool,
) -> None:
    """Count the batch and have the running statistics follow it, in place."""
    numbers, is_raw = batch.packed
    mean, var = running_mean.contiguous(), running_var.contiguous()
    count = None if counter is None else counter.to("cpu", torch.int64)
    failed = _functions().update_running(
        *_rows(mean, var), None if count is None else count.data_ptr(), numbers.data_ptr(), is_raw,
        mean.numel(), float("nan") if momentum is None else momentum, eps, is_std,
    )  # fmt: skip
    if failed:
        raise _no_memory("update_running")
    if mean is not running_mean:
        running_mean.copy_(mean)
    if var is not running_var:
        running_var.copy_(var)
    if counter is not None and count is not None and count is not counter:
        counter.copy_(count)
    mark_written(running_mean, running_var, counter)


def backward_sums(
    g: Tensor,
    x: Tensor,
    rows: Tensor,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[sum g, sum g xhat], shape (2, C), float64; the gradients of weight and bias, if any."""
    sizes, (x, g) = _dense(x, g)
    channels = sizes[2]
    local = torch.empty(2, channels, dtype=torch.float64, device="cpu")
    dweight = dbias = None
    if weight_dtype is not None:
        dweight = torch.empty(channels, dtype=weight_dtype, device="cpu")
    if bias_dtype is not None:
        dbias = torch.empty(channels, dtype=bias_dtype, device="cpu")
    failed = _functions().backward_sums(
        g.data_ptr(), x.data_ptr(), *sizes, rows.data_ptr(), rows.shape[0] > _ROWS,
        local.data_ptr(), *_rows(dweight, dbias), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise _no_memory("backward_sums")
    return local, dweight, dbias


def backward_input(
    g: Tensor,
    x: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    totals: Tensor,
    n: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """The gradient of x, in its type and layout; `totals` are to be divided by n, or by nothing."""
    given = x
    sizes, (x, g) = _dense(x, g)
    _kept, w = (None, None) if mask is None else _weights(mask, x)
    weight = weight if weight is None else weight.contiguous()
    totals = totals.contiguous()
    dx = torch.empty_like(x)
    failed = _functions().backward_input(
        g.data_ptr(), x.data_ptr(), dx.data_ptr(), *sizes, w, rows.data_ptr(),
        rows.shape[0] > _ROWS, *_rows(weight), totals.data_ptr(), None if n is None else n.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise _no_memory("backward_input")
    return dx if x is given else torch.empty_like(given).copy_(dx)


def follow_moments_(
    batch: Moments,
    mean: Tensor,
    var: Tensor,
    updates: Tensor,
    waits: Tensor,
    eps: float,
    options: Lagged,
) -> None:
    """Move the averages of `sync="lagged"`, as of `syncnorm.maths.lagged`."""
    numbers, is_raw = batch.packed
    failed = _functions().follow_moments(
        numbers.data_ptr(), is_raw, mean.numel(), mean.data_ptr(), var.data_ptr(), updates.data_ptr(),
        waits.data_ptr(), eps, options.max_drift, options.max_ratio, options.forward_rate,
    )  # fmt: skip
    if failed:
        raise _no_memory("follow_moments")
    mark_written(mean, var, updates, waits)


def follow_gradients_(sums: Tensor, gradient: Tensor, updates: Tensor, options: Lagged) -> None:
    """Move the averages of gradient means, as of `syncnorm.maths.lagged`."""
    _functions().follow_gradients(
        sums.data_ptr(), gradient.shape[1], gradient.data_ptr(), updates.data_ptr(),
        options.backward_rate,
    )  # fmt: skip
    mark_written(gradient, updates)
