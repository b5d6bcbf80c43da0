"""A normalisation layer on CUDA, in Triton: the passes over x, and with them all (C,)-sized work.

The functions are those of `syncnorm.maths.kernels.composed` and, for (C,)-sized numbers alone, of
`syncnorm.ops` and `syncnorm.maths.lagged`; in one launch each, two for sums that several programs
share. Any strides are taken as they are, without a copy of x. No tensor is empty.

Code that is compiled or exported, and fake tensors, go through the traced kernels, which the
compiler fuses with what is around them. On meta tensors each launch is an operator that does
nothing, `torch.ops.syncnorm.NAME(tensors)`, so that a `TorchDispatchMode` sees what a GPU would
launch, and what that reads and writes.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from syncnorm.maths.kernels.arguments import Reference, Scheduled, mark_written
from syncnorm.maths.moments import Moments

if TYPE_CHECKING:
    from syncnorm.maths.lagged import Lagged


_usable: dict[torch.device, bool] = {}


def is_usable(device: torch.device) -> bool:
    """True if Triton is installed and a kernel of it runs on the device; tried once, and waited for.

    While a graph is captured nothing can be tried.
    """
    if device.type == "meta":
        return _is_importable()  # nothing runs there
    if device not in _usable:
        if torch.cuda.is_current_stream_capturing():
            return False
        # In such a mode the wait raises, which would look like a fault of the kernel. Who has not set
        # one is spared torch's warning that it is a prototype.
        mode = torch.cuda.get_sync_debug_mode()
        if mode:
            torch.cuda.set_sync_debug_mode("default")
        try:
            _usable[device] = _has_worked(device)
        finally:
            if mode:
                torch.cuda.set_sync_debug_mode(mode)
    return _usable[device]


def _has_worked(device: torch.device) -> bool:
    """True if a kernel gives the right result.

    Triton compiles a part of itself where it is used, with a C compiler, and old GPUs are beyond
    it.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    sums = torch.ones(3, dtype=torch.float64, device=device)
    means, updates = torch.zeros_like(sums[:2]).view(2, 1), torch.zeros_like(sums[0]).long()
    try:
        for _ in range(2):  # the second is started in another way
            _launch().follow_gradients_(sums, means, updates, 0.5)
        return means.tolist() == [[1.0], [1.0]] and updates.item() == 2
    except Exception as error:  # whatever a driver or a compiler raises
        warnings.warn(
            f"Triton's kernels cannot be used on {device}, operators of torch are used instead, "
            f"which are slower: {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return False


@cache
def _launch() -> Any:
    """The module that needs Triton."""
    from syncnorm.maths.kernels.triton import launch

    return launch


@cache
def _is_importable() -> bool:
    try:
        _launch()
    except Exception:  # whatever a Triton raises that is not there, or broken
        return False
    return True


def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """Raw sums of one worker, shape (2C+1,), float64.

    The count is NaN where a weight is negative or not finite.
    """
    return _launch().moments(x, mask)


def normalize(
    x: Tensor,
    batch: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    reference: Reference | None,
) -> tuple[Tensor, Tensor]:
    """y, in the type and layout of x, and rows: (3, C), or (9, C) with a reference."""
    r_max = d_max = step = schedule = running_mean = running_var = None
    if reference is not None:
        running_mean, running_var, bounds = reference
        if isinstance(bounds, Scheduled):
            step, ramps = bounds
            schedule = (ramps.r_max, ramps.d_max, ramps.warmup_steps, ramps.r_steps, ramps.d_steps)
        else:
            r_max, d_max = bounds
    return _launch().normalize(
        x, *batch.packed, weight, bias, eps,
        running_mean, running_var, r_max, d_max, step, schedule,
    )  # fmt: skip


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
    _launch().update_running_(
        running_mean, running_var, counter, *batch.packed, momentum, eps, is_std
    )
    mark_written(running_mean, running_var, counter)


def backward_sums(
    g: Tensor,
    x: Tensor,
    rows: Tensor,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[sum g, sum g xhat], shape (2, C), float64; the gradients of weight and bias, if any."""
    return _launch().backward_sums(g, x, rows, weight_dtype, bias_dtype)


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
    return _launch().backward_input(g, x, rows, weight, totals, n, mask)


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
    _launch().follow_moments_(
        *batch.packed, mean, var, updates, waits, eps,
        options.max_drift, options.max_ratio, options.forward_rate,
    )  # fmt: skip
    mark_written(mean, var, updates, waits)


def follow_gradients_(sums: Tensor, gradient: Tensor, updates: Tensor, options: Lagged) -> None:
    """Move the averages of gradient means, as of `syncnorm.maths.lagged`."""
    _launch().follow_gradients_(sums, gradient, updates, options.backward_rate)
    mark_written(gradient, updates)


def add_identity(message: Tensor, size: int, identity: int) -> Tensor:
    """[message, identity, identity, ...], shape (size,), float64."""
    return _launch().add_identity(message, size, identity)


def compare_identity_(wire: Tensor, count: int, identity: int) -> None:
    """Write NaN over the first `count` numbers of a sum if the last is no multiple of `identity`."""
    _launch().compare_identity_(wire, count, identity)
