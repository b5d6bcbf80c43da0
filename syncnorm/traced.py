"""What code that is being compiled needs besides plain operators: things that are known, or done, when it runs.

Its exchanges are in `syncnorm.comm.exchange`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from syncnorm import ops
from syncnorm.errors import InputError
from syncnorm.maths.moments import Moments

F = TypeVar("F", bound=Callable[..., Any])


def untraced(function: F) -> F:
    """`function`, which compiled code calls rather than contains."""
    # torch.compiler.disable, with its import of seconds put off until something is compiled.
    apart = torch._disable_dynamo(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (apart if "torch._dynamo" in sys.modules else function)(*args, **kwargs)

    return cast(F, call)


def unless_repeated(batch: Moments, name: str) -> Moments:
    """The batch for the running statistics: in compiled code empty where a forward is repeated, so that none move.

    With a name, of a layer that would see other running statistics than at first, repeating is an error.
    """
    if not torch.compiler.is_compiling():
        return batch
    return Moments(_unless_repeated(batch.count, name), batch.mean, batch.m2)


def constant(t: Tensor) -> Tensor:
    """t; in compiled code a value that the backward pass keeps.

    It would otherwise compute the value anew, from running statistics that have moved since.
    """
    return _constant(t) if torch.compiler.is_compiling() else t


@torch.library.custom_op("syncnorm::unless_repeated", mutates_args=())
def _unless_repeated(count: Tensor, name: str) -> Tensor:
    if ops.backward_pass() == -1:
        return count.clone()
    if name:
        raise InputError(
            f"`checkpoint` must be within compiled code where it repeats a renormalisation, got {name} compiled and "
            "repeated from outside. Compile the model rather than its parts."
        )
    return torch.zeros_like(count)


@torch.library.custom_op("syncnorm::constant", mutates_args=())
def _constant(t: Tensor) -> Tensor:
    return t.clone()


@_unless_repeated.register_fake
def _(count: Tensor, name: str) -> Tensor:
    return torch.empty_like(count)


@_constant.register_fake
def _(t: Tensor) -> Tensor:
    return torch.empty_like(t)
