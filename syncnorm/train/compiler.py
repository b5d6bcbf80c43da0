"""Keeps torch's compiler out of processes that compile nothing.

Its import takes three seconds and 130 MiB of every worker. torch imports it to mark methods of
optimizers and of DistributedDataParallel as not to be compiled, and to ask how gradients of compiled
code are reduced. The names that start with an underscore are torch's own.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import _use_grad_for_differentiable

T = TypeVar("T")
_COMPILER = "torch._dynamo"
# The code of the two wrappers that import it, round whichever function they are.
_MARK = _disable_dynamo(lambda: None).__code__
_STEP = _use_grad_for_differentiable(lambda: None).__code__


def without_compiler(cls: type[T]) -> type[T]:
    """Derive a class that is as `cls`, and imports torch's compiler only if something else has."""
    own = {}
    for name in dir(cls):
        method = getattr(cls, name, None)
        plain = _unmarked(method)
        if plain is not None:
            own[name] = _while_not_compiling(plain, method)
    named = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**own, **named})  # pyright: ignore[reportReturnType]


def _while_not_compiling(plain: Callable[..., Any], method: Any) -> Callable[..., Any]:
    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (method if _COMPILER in sys.modules else plain)(*args, **kwargs)

    return call


def _unmarked(method: Any) -> Callable[..., Any] | None:
    """The function that torch has put its wrapper round; None if it has put none."""
    wrapper = method
    while getattr(wrapper, "__code__", None) not in (_MARK, _STEP):
        wrapper = getattr(wrapper, "__wrapped__", None)
        if wrapper is None:
            return None
    function = wrapper.__wrapped__
    if wrapper.__code__ is _STEP:
        return _step(function)
    return contextmanager(function) if inspect.isgeneratorfunction(function) else function


def _step(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return function(self, *args, **kwargs)

    return step


@contextmanager
def compiler_put_off() -> Iterator[None]:
    """Let DistributedDataParallel be built without torch's compiler."""
    if _COMPILER in sys.modules:
        yield
        return
    stand_in = _StandIn()
    torch._dynamo = stand_in
    try:
        yield
    finally:
        if torch._dynamo is stand_in:
            del torch._dynamo


class _StandIn:
    """Answers the one question; for all others the compiler is imported."""

    # The default, which nobody can have changed without the import.
    utils = SimpleNamespace(get_optimize_ddp_mode=lambda: "ddp_optimizer")

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(_COMPILER), name)
