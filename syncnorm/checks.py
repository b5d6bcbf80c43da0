"""Checks of arguments, for layers and functions: each raises the one error of its rule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from syncnorm import tracing
from syncnorm.comm import debug, groups
from syncnorm.device import is_host
from syncnorm.errors import FaultError, InputError, SingleValueWarning
from syncnorm.maths.moments import Unread
from syncnorm.maths.precision import sum_dtype

if TYPE_CHECKING:
    from syncnorm.ops import Statistic

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Find the input among the arguments of a norm's call, whatever it is called; None: not there."""
    given = (value for name, value in kwargs.items() if name != "mask" and value is not None)
    return args[0] if args else next(given, None)


def one_input(x: Tensor | None, input: Tensor | None) -> Tensor:
    """The input of a layer, given by our name or by torch's."""
    if x is not None and input is not None:
        raise InputError(
            "`x` must be given once, got `input` too. These are two names of one argument."
        )
    given = input if x is None else x
    if given is None:
        raise InputError(
            "`x` must be given, got None. Call the layer with a tensor of shape (N, C, *S)."
        )
    return given


def check_local(x: Tensor) -> None:
    """Raise InputError if x is a DTensor, whose values are those of several workers."""
    if hasattr(x, "device_mesh"):  # torch's own test would import all that DTensor needs
        raise InputError(
            f"`x` must be this worker's shard in training, got a {type(x).__name__} of shape "
            f"{tuple(x.shape)}. Pass x.to_local(), sharded along dimension 0: the layer pools over the "
            "workers itself."
        )


def check_input(x: Tensor, num_features: int | None) -> None:
    """Raise InputError unless x is a floating (N, C, *S) tensor with C = num_features."""
    if not isinstance(x, Tensor):
        raise _no_tensor("x", x)
    if x.is_nested and x.layout == torch.strided:  # which has no shape to speak of
        raise InputError(
            "`x` must be dense, got a nested tensor. Call torch.nested.to_padded_tensor(x, 0.0), and "
            "give a mask."
        )
    if x.ndim < 2:
        raise InputError(
            f"`x` must have 2 or more dimensions (N, C, *S), got {x.ndim} (shape "
            f"{tuple(x.shape)}). "
            "Add a batch dimension with x.unsqueeze(0)."
        )
    if x.layout != torch.strided:
        raise InputError(
            f"`x` must be dense, got {x.layout} (shape {tuple(x.shape)}). Call x.to_dense(), or "
            "normalise its values, as rows (N, C), where zeros should not count."
        )
    if x.dtype not in _FLOATS:
        raise InputError(
            f"`x` must be float32, float64, bfloat16 or float16, got {x.dtype} (shape "
            f"{tuple(x.shape)}). "
            "Convert it with x.float()."
        )
    if num_features is not None and x.shape[1] != num_features:
        raise InputError(
            f"`x` must have num_features = {num_features} channels in dimension 1, got "
            f"{x.shape[1]} "
            f"(shape {tuple(x.shape)}). Move the channels to dimension 1, or build the layer for "
            f"{x.shape[1]}."
        )


def no_script(layer: nn.Module) -> InputError:
    """Make the error of a layer that is given to torch.jit.script."""
    return InputError(
        f"`torch.jit.script` must be given torch's layers, got {type(layer).__name__}. Script "
        "revert(model), where that gives them, or trace the model in evaluation mode."
    )


def _no_tensor(name: str, value: object) -> InputError:
    if isinstance(value, Proxy):
        return InputError(
            f"`{name}` must be a tensor, got a proxy of torch.fx. Have its tracer take the layer "
            "for one node: is_leaf_module."
        )
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return InputError(
        f"`{name}` must be a tensor, got a {kind}. torch.as_tensor makes one of an array."
    )


def check_hyperparameters(num_features: int, eps: float, momentum: float | None) -> None:
    """Raise InputError unless a layer can be built with these."""
    if num_features < 1:
        raise InputError(
            f"`num_features` must be at least 1, got {num_features}. Pass the number of channels."
        )
    if not eps > 0:
        raise InputError(f"`eps` must be > 0, got {eps}. The default is 1e-5.")
    if momentum is not None and not 0 <= momentum <= 1:
        raise InputError(
            f"`momentum` must be in [0, 1], or None for a cumulative average, got {momentum}. "
            "It is the weight of the new value."
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise InputError unless `value` is one of the choices, the first being the default."""
    if value not in choices:
        known = " or ".join(f'"{choice}"' for choice in choices)
        raise InputError(f'`{name}` must be {known}, got {value!r}. The default is "{choices[0]}".')


def check_running_average(value: str) -> None:
    """Raise InputError unless it is "std" or "var"."""
    check_choice("running_average", value, ("std", "var"))


def check_bounds(
    r_max: float | Tensor, d_max: float | Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The bounds as float64 tensors, or InputError if they are out of range (or NaN).

    They come from the schedule and the step, equal on all workers. On CUDA they are looked at in
    debug mode only, if they are tensors there.
    """
    for name, value, least in (("r_max", r_max, 1.0), ("d_max", d_max, 0.0)):
        if value.numel() != 1 if isinstance(value, Tensor) else not isinstance(value, Real):
            raise InputError(
                f"`{name}` must be a number or a tensor of one, got {value!r}. Correct the "
                "schedule."
            )
        if isinstance(value, Tensor) and (
            torch.compiler.is_compiling() or tracing.tracer_of(value) is not None
        ):
            continue
        is_free = not isinstance(value, Tensor) or is_host(value) or debug.is_on
        if is_free and not value >= least:
            raise InputError(
                f"`{name}` must be >= {least:g}, got {float(value):g}. Correct the schedule."
            )
    return _as_scalar(r_max, device), _as_scalar(d_max, device)


def _as_scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """A tensor of shape () in the type of sums, made without a copy from the host to a CUDA device."""
    if isinstance(value, Tensor):
        return value.to(device, sum_dtype(device))
    return torch.full((), value, dtype=sum_dtype(device), device=device)


def check_pair(
    running_mean: Tensor | None, running_var: Tensor | None, name: str | None = None
) -> None:
    """Raise InputError unless both are there or neither; of a function's, or a layer's by name."""
    if (running_mean is None) != (running_var is None):
        where = "" if name is None else f" in {name!r}"
        raise InputError(
            f"`running_mean` and `running_var` must be given together, got one{where}. Pass both "
            "or neither."
        )


def expand_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The mask as floating weights, expanded to (N, 1, *S); InputError if it does not broadcast."""
    if not isinstance(mask, Tensor):
        raise _no_tensor("mask", mask)
    shape = (x.shape[0], 1, *x.shape[2:])
    if mask.is_complex():
        raise InputError(
            f"`mask` must be bool or real, got {mask.dtype} (shape {tuple(mask.shape)}). Take its "
            "abs()."
        )
    try:
        expanded = mask.detach().expand(shape)
    except RuntimeError:
        raise InputError(
            f"`mask` must broadcast to (N, 1, *S) = {shape}, got shape {tuple(mask.shape)}. "
            "A mask without a channel dimension needs mask.unsqueeze(1)."
        ) from None
    return expanded if expanded.is_floating_point() else expanded.to(torch.float32)


def check_count(statistic: Statistic, warn: Callable[[], None]) -> None:
    """Call `warn` if a statistic is over one value; in debug mode raise, if all workers do so.

    A pooled count is known to all. On CUDA it is looked at in debug mode only.
    """
    n = statistic.moments.n
    if isinstance(statistic.moments, Unread):
        return
    # A weight of 1 may also be that of several values.
    is_looked_at = not isinstance(n, Tensor) or debug.is_on
    if is_looked_at and n == 1 and not statistic.moments.m2.any():
        if debug.is_on and (statistic.is_pooled or not groups.is_shared()):
            raise FaultError(
                "`x` must give a statistic more than one value per channel, got a total weight of "
                "1 over all workers. "
                "Use larger batches or evaluation mode."
            )
        warn()


def warn_single_value() -> None:
    """Say that the batch says nothing about its scale."""
    warnings.warn(
        "a training statistic was taken over a single value per channel: its variance is 0, the "
        "output does not "
        "depend on the input, and the running variance was left as it is",
        SingleValueWarning,
        stacklevel=4,
    )


def wrong_shape(name: str, t: Tensor, channels: int, x: Tensor | None) -> InputError:
    """Make the error of a tensor that is not (C,), for the input x if it is at hand."""
    of_x = "" if x is None else f" (x has shape {tuple(x.shape)})"
    return InputError(
        f"`{name}` must have shape ({channels},), got {tuple(t.shape)}{of_x}. "
        "It holds one value per channel."
    )


def wrong_running(
    running_mean: Tensor, running_var: Tensor, channels: int, x: Tensor | None = None
) -> InputError:
    is_mean = running_mean.shape != (channels,)
    name, t = ("running_mean", running_mean) if is_mean else ("running_var", running_var)
    return wrong_shape(name, t, channels, x)


def check_devices(x: Tensor, **others: Tensor | None) -> None:
    """Raise InputError unless all tensors are where x is: a kernel of a device would not ask."""
    for name, t in others.items():
        if t is not None and t.device != x.device:
            raise InputError(
                f"`{name}` must be on the device of x, {x.device}, got {t.device}. Move the module "
                "or the data with .to(device)."
            )
