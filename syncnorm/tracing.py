"""Tracers: what follows the operators of a call rather than its numbers.

Transforms of torch.func, torch.jit.trace, make_fx, torch.export, fake tensors and the like. They would not
see an exchange, and a look at a number fails or is recorded. torch.compile is not among them: code
can ask whether it is being compiled (see `syncnorm.compiled`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy, Tracer

from syncnorm.device import first_tensor, is_host
from syncnorm.errors import InputError
from syncnorm.undocumented import (
    FakeTensor,
    count_dispatch_modes,
    dynamo_tracer,
    forward_mode_level,
    has_fake_mode,
    has_legacy_batch,
    has_proxy_mode,
    has_transform,
    is_jit_tracing,
)

F = TypeVar("F", bound=Callable[..., Any])

FAKE = "fake tensors"
"""The tracer that has shapes and types and no numbers: meta tensors, too."""


def tracer_of(t: Tensor) -> str | None:
    """Name the tracer of the operators on `t`, as errors do; None in an ordinary call."""
    if torch.compiler.is_compiling():
        # What is exported or transformed is the operators: the gradient has to be found in them.
        return dynamo_tracer()
    if not (
        has_transform()
        or is_jit_tracing()
        or count_dispatch_modes()
        or forward_mode_level() >= 0
        or t.is_meta
        or has_legacy_batch(t)
        or type(t) is not Tensor
    ):
        return None
    return _name(t)


def _name(t: Tensor) -> str | None:
    if has_transform():
        return "a transform of torch.func"
    if is_jit_tracing():
        return "torch.jit.trace"
    if forward_mode_level() >= 0:
        return "forward-mode differentiation"
    if has_legacy_batch(t):
        return "a batch of gradients"
    if has_proxy_mode():
        return "make_fx"
    if t.is_meta or isinstance(t, FakeTensor) or has_fake_mode():
        return FAKE
    return None


def is_fake(module: nn.Module) -> bool:
    """True if the module's own tensors have no numbers."""
    first = first_tensor(module)
    return first is not None and tracer_of(first) == FAKE


def is_readable(t: Tensor) -> bool:
    """True if t has numbers, and they may be looked at without a wait for a device."""
    return is_host(t) and tracer_of(t) != FAKE


def refuse(tracer: str, name: str) -> InputError:
    """Return the error for an exchange that the tracer would not see.

    Raised before any exchange, so on all ranks that run the same code.
    """
    return InputError(
        f"`sync` must leave the statistics to this worker alone under {tracer}, got an exchange in "
        f'{name or "a call"} that would be no part of it. Use evaluation mode, or sync="none", or '
        "torch's layers by revert(model)."
    )


@contextmanager
def updating(tracer: str, name: str) -> Iterator[None]:
    """Name the remedy where running statistics cannot be updated within a transform."""
    try:
        yield
    except RuntimeError as error:
        raise InputError(
            f"`track_running_stats` must be False under {tracer}, or the buffers an argument of what "
            "is transformed (see torch.func.functional_call), got running statistics that cannot "
            f"be updated there in {name}. Build the layer without them, or use evaluation mode."
        ) from error


def module_call(module: nn.Module, x: Proxy, mask: Any) -> Any:
    """Make the call of `module` one node of torch.fx's graph, like that of a layer of torch's."""
    target = cast(Tracer, x.tracer).path_of_module(module)
    if not target:
        raise InputError(
            "`symbolic_trace` must be given a module that contains the layer, got "
            f"{type(module).__name__} itself. Put it into torch.nn.Sequential."
        )
    return x.tracer.create_proxy(
        "call_module", target, (x,), {} if mask is None else {"mask": mask}
    )


def function_call(function: F) -> F:
    """Make each call of `function` one node of torch.fx's graph."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get("x")
        if isinstance(x, Proxy):
            return x.tracer.create_proxy("call_function", call, args, kwargs)
        return function(*args, **kwargs)

    return cast(F, call)
