"""Launches of the kernels: outputs, sizes and strides, and as little else as may be."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from syncnorm.maths.kernels.triton import channels, device
from syncnorm.maths.kernels.triton.geometry import (
    ELEMENTWISE,
    SUMS_OF_MASKED,
    SUMS_OF_ONE,
    SUMS_OF_TWO,
    Plan,
    Work,
    plan,
)

# For tensors of the CPU, where Triton's interpreter runs one program after the other.
_INTERPRETED = 1
# Meta tensors stand for those of an H100.
_PROCESSORS_OF_META = 132
_NO_STRIDES = (0,) * 6
_CHANNELS = 128
# Channels that a program takes at a time that goes through all of them.
_ALONE = 512
# Numbers of a message that a program takes.
_NUMBERS = 512
_NOTHING, _GIVEN, _SCHEDULE = 0, 1, 2

# Triton compiles for tensors of a type whose address this divides or does not, and for numbers of
# certain kinds. On AMD's devices it looks at more.
_ALIGNMENT = 16
_IS_KEPT = torch.version.hip is None
_MOST_KEPT = 4096
_kept: dict[tuple[Any, ...], Callable[..., object]] = {}
"""What starts a compiled kernel, by what it was compiled for and its numbers.

Triton's own search for it takes three times as long as the rest of a launch.
"""


@functools.lru_cache
def _processors(of: torch.device) -> int:
    if of.type != "cuda":
        return _PROCESSORS_OF_META if of.type == "meta" else _INTERPRETED
    return torch.cuda.get_device_properties(of).multi_processor_count


@functools.lru_cache(maxsize=1024)
def _bits(value: float) -> int:
    """A float64 as an integer: Triton passes a Python number as a float32."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


@functools.cache
def _operators() -> torch.library.Library:
    return torch.library.Library("syncnorm", "FRAGMENT")


@functools.cache
def _operator(name: str) -> Any:
    """The operator of a kernel on meta tensors: it is given what the kernel reads and writes."""
    _operators().define(f"{name}(Tensor[] tensors) -> ()")
    _operators().impl(name, lambda tensors: None, "Meta")
    return getattr(torch.ops.syncnorm, name)


def _launch(
    kernel: Any,
    programs: int,
    of: torch.device,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int, ...],
    warps: int = 4,
) -> None:
    """Start a kernel, whose parameters are the tensors and then the numbers."""
    if of.type == "meta":
        _operator(kernel.__name__)([t.detach() for t in tensors if t is not None])
    elif of.type == "cuda" and of.index != torch.cuda.current_device():
        with torch.cuda.device(of):
            _start(kernel, programs, of, tensors, numbers, warps)
    else:
        _start(kernel, programs, of, tensors, numbers, warps)


def _start(
    kernel: Any,
    programs: int,
    of: torch.device,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int, ...],
    warps: int,
) -> None:
    kinds = [None if t is None else (t.dtype, t.data_ptr() % _ALIGNMENT == 0) for t in tensors]
    key = (kernel.fn, programs, of.index, numbers, warps, *kinds)
    start = _kept.get(key)
    if start is not None:
        start(*tensors, *numbers)
        return
    compiled = kernel[(programs,)](*tensors, *numbers, num_warps=warps, enable_fp_fusion=True)
    # The interpreter has nothing to give.
    if compiled is not None and _IS_KEPT:
        if len(_kept) >= _MOST_KEPT:
            _kept.clear()
        _kept[key] = compiled[(programs, 1, 1)]


def _plan(mask: Tensor | None, work: Work, x: Tensor, *others: Tensor) -> Plan | None:
    return plan(
        tuple(x.shape),
        (x.stride(), *[t.stride() for t in others]),
        None if mask is None else mask.stride(),
        x.element_size(),
        work,
        _processors(x.device),
    )


def _one_row(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def _strides(p: Plan, mask: Tensor | None) -> tuple[list[int], tuple[bool, ...]]:
    """All strides one after the other, those of a mask last, and what is flat."""
    strides = [i for s in p.strides for i in s]
    return (strides, p.flat) if mask is not None else ([*strides, *_NO_STRIDES], (*p.flat, False))


def _combining(splits: int, channels: int) -> tuple[int, int, int]:
    """Programs, and the splits and channels of a block, to add the splits."""
    block = min(32, 1 << (channels - 1).bit_length())
    return -(-channels // block), min(1024 // block, 1 << (splits - 1).bit_length()), block


def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    p = _plan(mask, SUMS_OF_ONE if mask is None else SUMS_OF_MASKED, x)
    if p is None:
        return moments(x.contiguous(), None if mask is None else mask.contiguous())
    of, c, splits = x.device, x.shape[1], p.splits
    sums = torch.empty(2 * c + 1, dtype=torch.float64, device=of)
    parts = (
        None if splits == 1 else torch.empty(2 * (c + 1) * splits, dtype=torch.float64, device=of)
    )
    count = x.numel() // c
    strides, flat = _strides(p, mask)
    _launch(
        device.moments, p.programs, of, (x, mask, sums, parts),
        (count, c, splits, *p.sizes, *strides, *p.shape, *flat, splits == 1), p.warps,
    )  # fmt: skip
    if splits > 1:
        programs, *blocks = _combining(splits, c)
        _launch(
            channels.add_moments, programs, of, (parts, sums),
            (count, c, splits, mask is not None, *blocks),
        )  # fmt: skip
    return sums


def normalize(
    x: Tensor,
    batch: Tensor,
    is_raw: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    r_max: Tensor | None,
    d_max: Tensor | None,
    step: Tensor | None,
    schedule: Sequence[float] | None,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x)
    p = _plan(None, ELEMENTWISE, x, y)
    if p is None:
        dense, rows = normalize(
            x.contiguous(), batch, is_raw, weight, bias, eps,
            running_mean, running_var, r_max, d_max, step, schedule,
        )  # fmt: skip
        return y.copy_(dense), rows
    bounds = _NOTHING if running_mean is None else _GIVEN if schedule is None else _SCHEDULE
    c = x.shape[1]
    rows = torch.empty(9 if bounds else 3, c, dtype=torch.float64, device=x.device)
    r_end, d_end, *steps = schedule or (0.0, 0.0, 0, 0, 0)
    _launch(
        device.normalize, p.programs, x.device,
        (x, y, batch, rows, _one_row(weight), _one_row(bias),
         _one_row(running_mean), _one_row(running_var), r_max, d_max, step),
        (_bits(eps), _bits(r_end), _bits(d_end), *map(int, steps), c,
         *p.sizes, *p.strides[0], *p.strides[1], *p.shape, *p.flat, is_raw, bounds),
        p.warps,
    )  # fmt: skip
    return y, rows


def update_running_(
    running_mean: Tensor,
    running_var: Tensor,
    counter: Tensor | None,
    batch: Tensor,
    is_raw: bool,
    momentum: float | None,
    eps: float,
    is_std: bool,
) -> None:
    if not (running_mean.is_contiguous() and running_var.is_contiguous()):
        dense = running_mean.contiguous(), running_var.contiguous()
        update_running_(*dense, counter, batch, is_raw, momentum, eps, is_std)
        running_mean.copy_(dense[0])
        running_var.copy_(dense[1])
        return
    c = running_mean.numel()
    _launch(
        channels.update_running, 1 if momentum is None else -(-c // _CHANNELS), batch.device,
        (running_mean, running_var, counter, batch),
        (_bits(eps), _bits(momentum or 0.0), c, is_raw, is_std, momentum is None, _CHANNELS),
    )  # fmt: skip


def backward_sums(
    g: Tensor,
    x: Tensor,
    rows: Tensor,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    p = _plan(None, SUMS_OF_TWO, x, g)
    if p is None:
        return backward_sums(g.contiguous(), x.contiguous(), rows, weight_dtype, bias_dtype)
    of, c, splits = x.device, x.shape[1], p.splits
    local = torch.empty(2, c, dtype=torch.float64, device=of)
    dweight, dbias = (
        None if dtype is None else torch.empty(c, dtype=dtype, device=of)
        for dtype in (weight_dtype, bias_dtype)
    )
    parts = None if splits == 1 else torch.empty(2 * c * splits, dtype=torch.float64, device=of)
    is_corrected = rows.shape[0] > 3
    _launch(
        device.backward_sums, p.programs, of, (g, x, rows, local, dweight, dbias, parts),
        (c, splits, *p.sizes, *p.strides[0], *p.strides[1], *p.shape, *p.flat, splits == 1,
         is_corrected),
        p.warps,
    )  # fmt: skip
    if splits > 1:
        programs, *blocks = _combining(splits, c)
        _launch(
            channels.add_gradients, programs, of, (parts, rows, local, dweight, dbias),
            (c, splits, is_corrected, *blocks),
        )  # fmt: skip
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
    dx = torch.empty_like(x)
    p = _plan(mask, ELEMENTWISE, x, g, dx)
    if p is None:
        mask = None if mask is None else mask.contiguous()
        return dx.copy_(
            backward_input(g.contiguous(), x.contiguous(), rows, weight, totals, n, mask)
        )
    strides, flat = _strides(p, mask)
    _launch(
        device.backward_input, p.programs, x.device,
        (g, x, dx, mask, rows, _one_row(weight), totals, n),
        (x.shape[1], *p.sizes, *strides, *p.shape, *flat, rows.shape[0] > 3), p.warps,
    )  # fmt: skip
    return dx


def follow_moments_(
    batch: Tensor,
    is_raw: bool,
    mean: Tensor,
    var: Tensor,
    updates: Tensor,
    waits: Tensor,
    eps: float,
    max_drift: float,
    max_ratio: float,
    rate: float,
) -> None:
    _launch(
        channels.follow_moments, 1, mean.device, (batch, mean, var, updates, waits),
        (_bits(eps), _bits(max_drift), _bits(max_ratio), _bits(rate), mean.numel(), is_raw, _ALONE),
    )  # fmt: skip


def follow_gradients_(sums: Tensor, gradient: Tensor, updates: Tensor, rate: float) -> None:
    _launch(
        channels.follow_gradients, 1, gradient.device, (sums, gradient, updates),
        (_bits(rate), gradient.shape[1], _ALONE),
    )  # fmt: skip


def add_identity(message: Tensor, size: int, identity: int) -> Tensor:
    wire = torch.empty(size, dtype=torch.float64, device=message.device)
    _launch(
        channels.add_identity, -(-size // _NUMBERS), message.device, (message.contiguous(), wire),
        (identity, message.numel(), size, _NUMBERS),
    )  # fmt: skip
    return wire


def compare_identity_(wire: Tensor, count: int, identity: int) -> None:
    size = wire.numel()
    _launch(
        channels.compare_identity, -(-count // _NUMBERS), wire.device, (wire,),
        (identity, count, size, _NUMBERS),
    )  # fmt: skip
