"""Who looks at the operators of a call rather than at its numbers: function transforms, tracers,
fake tensors.

Code that torch.compile and torch.export trace is not meant: they know themselves (see
`syncnorm.compiled`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx import Proxy, Tracer

from syncnorm.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])

FAKE = "fake tensors"
"""An observer that has shapes and types and no numbers: meta tensors, too."""

# Not documented functions; a test notices if they change. Bound once, since every call asks them.
_has_transform = torch._C._are_functorch_transforms_active
_has_trace = torch._C._is_tracing
_has_batch = torch._C._functorch.is_legacy_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]
_count_modes = torch._C._len_torch_dispatch_stack
_find_mode = torch._C._get_dispatch_mode
_Modes = torch._C._TorchDispatchModeKey


def observer(t: Tensor) -> str | None:
    """What looks at the operators on `t`, as errors call it; None in an ordinary call."""
    if torch.compiler.is_compiling() or not (
        _has_transform()
        or _has_trace()
        or _count_modes()
        or forward_ad._current_level >= 0
        or t.is_meta
        or _has_batch(t)
        or type(t) is not Tensor
    ):
        return None
    return _name(t)


def _name(t: Tensor) -> str | None:
    if _has_transform():
        return "a transform of torch.func"
    if _has_trace():
        return "torch.jit.trace"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if _has_batch(t):
        return "a batch of gradients"
    if _find_mode(_Modes.PROXY) is not None:
        return "make_fx"
    if t.is_meta or isinstance(t, FakeTensor) or _find_mode(_Modes.FAKE) is not None:
        return FAKE
    return None


def is_fake(module: nn.Module) -> bool:
    """Whether the module's own tensors have no numbers."""
    tensors = (*module.buffers(recurse=False), *module.parameters(recurse=False))
    return any(observer(t) == FAKE for t in tensors[:1])


def refuse(who: str, name: str) -> InputError:
    """The error where what looks would not see an exchange.

    It comes before any, on all workers that do the same.
    """
    return InputError(
        f"`sync` must leave the statistics to this worker alone under {who}, got an exchange in "
        f"{name or 'a call'} "
        'that would be no part of it. Use evaluation mode, or sync="none", or torch\'s layers by '
        "revert(model)."
    )


@contextmanager
def updating(who: str, name: str) -> Iterator[None]:
    """Say what to do where running statistics cannot be updated within a transform."""
    try:
        yield
    except RuntimeError as error:
        raise InputError(
            f"`track_running_stats` must be False under {who}, or the buffers an argument of what "
            "is transformed (see "
            "torch.func.functional_call), got running statistics that cannot be updated there in "
            f"{name}. "
            "Build the layer without them, or use evaluation mode."
        ) from error


def module_call(module: nn.Module, x: Proxy, mask: Any) -> Any:
    """The call of `module` as one node of the graph that torch.fx makes, as of a layer of torch's
    own.
    """
    target = cast(Tracer, x.tracer).path_of_module(module)
    if not target:
        raise InputError(
            "`symbolic_trace` must be given a module that contains the layer, got "
            f"{type(module).__name__} itself. "
            "Put it into torch.nn.Sequential."
        )
    return x.tracer.create_proxy(
        "call_module", target, (x,), {} if mask is None else {"mask": mask}
    )


def function_call(function: F) -> F:
    """`function`, whose calls are one node of a graph that torch.fx makes."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get("x")
        if isinstance(x, Proxy):
            return x.tracer.create_proxy("call_function", call, args, kwargs)
        return function(*args, **kwargs)

    return cast(F, call)
