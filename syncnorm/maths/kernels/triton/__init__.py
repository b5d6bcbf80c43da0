"""A normalisation layer on CUDA, in Triton: the passes over x, and one launch for all (C,) work.

    moments          x, w -> [sum wx, sum wx^2, sum w]; whether a weight was none
    normalize        x, sums or moments -> y, and rows [mean, m2, invstd] or [.., r, d]
    update_running_  the running statistics follow the batch
    backward_sums    g, x, rows -> [sum g, sum g xhat]; the gradients of weight and bias
    backward_input   g, x, rows, [sum g, sum g xhat] of all workers -> dx
    pack, check_     a message with its identity, and the look at it after the sum

Shapes: x and g (N, C, *S), any floating type, any strides, not empty; w (N, 1, *S) or None; weight
and bias (C,) or None. Sums and rows are float64. No number is read on the host. The same functions
are operators `syncnorm_triton::...`, for fake tensors and for code that is exported.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

Numbers = tuple[float, float, int, int, int]
"""r_max, d_max, warmup_steps, r_steps, d_steps of a `maths.renorm.RenormSchedule`."""
Reference = tuple[Tensor, Tensor, tuple[Tensor, Tensor] | tuple[Tensor, Numbers]]
"""Running mean and variance, and the bounds of r and d: (r_max, d_max), float64, shape (); or an
integer step, shape (), and the numbers of the schedule that it is a step of."""


@cache
def is_available() -> bool:
    """True if Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The raw sums (2C+1,), and whether a weight is negative or not finite, bool ().

    Such a weight counts as 0. Without a mask there is no fault to tell of.
    """
    if _is_plain(x):
        return _launch().moments(x, mask)
    if mask is None:
        return _operators.moments.default(x), None
    return _operators.moments.masked(x, mask)


def normalize(
    x: Tensor,
    batch: Tensor,
    is_raw: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    reference: Reference | None = None,
) -> tuple[Tensor, Tensor]:
    """y, in the type and layout of x; and rows (3, C), or (5, C) with a reference.

    Args:
        x: shape (N, C, *S).
        batch: raw sums [sum wx, sum wx^2, n] or moments [mean, m2, n], shape (2C+1,), float64.
        is_raw: which of them.
        weight, bias: shape (C,), or None.
        eps: added to the variance.
        reference: what batch renormalisation corrects towards.
    """
    running_mean = running_var = r_max = d_max = step = schedule = None
    if reference is not None:
        running_mean, running_var, (first, second) = reference
        if isinstance(second, Tensor):
            r_max, d_max = first, second
        else:
            step, schedule = first, second
    run: Any = _launch().normalize if _is_plain(x) else _operators.normalize.default
    return run(
        x, batch, is_raw, weight, bias, eps,
        running_mean, running_var, r_max, d_max, step, schedule,
    )  # fmt: skip


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
    """Count the batch and have the running statistics follow it, in place.

    Args:
        running_mean, running_var: shape (C,).
        counter: of batches, an integer, or None.
        batch, is_raw: as of `normalize`.
        momentum: the weight of the batch; None is 1 / counter.
        eps: of the layer, for `is_std`.
        is_std: True if standard deviations are averaged in place of variances.
    """
    run: Any = _launch().update_running_ if _is_plain(batch) else _operators.update_running_.default
    run(running_mean, running_var, counter, batch, is_raw, momentum, eps, is_std)


def backward_sums(
    g: Tensor, x: Tensor, rows: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[sum g, sum g xhat], shape (2, C), and the gradients of weight and bias, if there are."""
    run: Any = _launch().backward_sums if _is_plain(x) else _operators.backward_sums.default
    local, *rest = run(g, x, rows, weight, bias)
    dweight = None if weight is None else rest.pop(0)
    return local, dweight, None if bias is None else rest.pop()


def backward_input(
    g: Tensor,
    x: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    totals: Tensor,
    n: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """dx, in the type and layout of x.

    Args:
        g, x, rows, weight: as before.
        totals: [sum g, sum g xhat] over the statistic, shape (2, C), float64; their means if `n` is
            None.
        n: the count of the statistic, shape (), float64.
        mask: the weights; what is none counts as 0.
    """
    run: Any = _launch().backward_input if _is_plain(x) else _operators.backward_input.default
    return run(g, x, rows, weight, totals, n, mask)


def pack(message: Tensor, size: int, identity: int, fault: Tensor | None) -> Tensor:
    """The message, then its identity in all the rest, shape (size,), float64.

    Where `fault` is true the last number of the message, a count, is NaN instead.
    """
    run: Any = _launch().pack if _is_plain(message) else _operators.pack.default
    return run(message, size, identity, fault)


def check_(wire: Tensor, count: int, identity: int) -> None:
    """Make the first `count` numbers NaN if the last one is no multiple of the identity."""
    run: Any = _launch().check_ if _is_plain(wire) else _operators.check_.default
    run(wire, count, identity)


def _is_plain(t: Tensor) -> bool:
    """True if a launch will do, which costs the host less than an operator does."""
    return type(t) is Tensor and not t.is_meta and not torch.compiler.is_compiling()


@cache
def _launch() -> Any:
    """The module that needs Triton."""
    from syncnorm.maths.kernels.triton import launch

    return launch


_SCHEMAS = (
    "moments(Tensor x) -> Tensor",
    "moments.masked(Tensor x, Tensor mask) -> (Tensor, Tensor)",
    "normalize(Tensor x, Tensor batch, bool is_raw, Tensor? weight, Tensor? bias, float eps, "
    "Tensor? running_mean, Tensor? running_var, Tensor? r_max, Tensor? d_max, Tensor? step, "
    "float[]? schedule) -> (Tensor, Tensor)",
    "update_running_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? counter, "
    "Tensor batch, bool is_raw, float? momentum, float eps, bool is_std) -> ()",
    "backward_sums(Tensor g, Tensor x, Tensor rows, Tensor? weight, Tensor? bias) -> Tensor[]",
    "backward_input(Tensor g, Tensor x, Tensor rows, Tensor? weight, Tensor totals, Tensor? n, "
    "Tensor? mask) -> Tensor",
    "pack(Tensor message, SymInt size, int identity, Tensor? fault) -> Tensor",
    "check_(Tensor(a!) wire, SymInt count, int identity) -> ()",
)

_library = torch.library.Library("syncnorm_triton", "DEF")
_operators: Any = torch.ops.syncnorm_triton


def _float64(of: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=of.device)


def _moments_like(x: Tensor) -> Tensor:
    return _float64(x, 2 * x.shape[1] + 1)


def _masked_moments_like(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return _moments_like(x), torch.empty((), dtype=torch.bool, device=x.device)


def _normalize_like(x, batch, is_raw, weight, bias, eps, running_mean, *bounds):
    return torch.empty_like(x), _float64(x, 3 if running_mean is None else 5, x.shape[1])


def _backward_sums_like(g, x, rows, weight, bias):
    likes = [
        torch.empty(x.shape[1], dtype=t.dtype, device=x.device)
        for t in (weight, bias)
        if t is not None
    ]
    return [_float64(x, 2, x.shape[1]), *likes]


def _register() -> None:
    for schema in _SCHEMAS:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CUDA", "CPU"):
        for name in (
            "normalize",
            "update_running_",
            "backward_sums",
            "backward_input",
            "pack",
            "check_",
        ):
            _library.impl(name, lambda *args, name=name: getattr(_launch(), name)(*args), key)
        _library.impl("moments", lambda x: _launch().moments(x, None)[0], key)
        _library.impl("moments.masked", lambda x, mask: _launch().moments(x, mask), key)
    for name, like in {
        "moments": _moments_like,
        "moments.masked": _masked_moments_like,
        "normalize": _normalize_like,
        "update_running_": lambda *args: None,
        "backward_sums": _backward_sums_like,
        "backward_input": lambda g, x, *args: torch.empty_like(x),
        "pack": lambda message, size, *args: _float64(message, size),
        "check_": lambda *args: None,
    }.items():
        torch.library.register_fake(f"syncnorm_triton::{name}", like, lib=_library)


_register()
