"""torch.compile support: operators for what is known, or done, only when compiled code runs.

Its exchanges are in `syncnorm.comm`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from syncnorm.errors import InputError
from syncnorm.maths.moments import Moments, Unread

F = TypeVar("F", bound=Callable[..., Any])


# The number of the backward pass that is running; -1 outside of one. Not a documented function; FSDP2
# relies on it too, and a test notices if it changes. Bound once, since every call asks it.
backward_pass = torch._C._current_graph_task_id


def untraced(function: F) -> F:
    """`function`, which compiled code calls rather than contains."""
    # torch.compiler.disable, with its import of seconds put off until something is compiled.
    apart = _disable_dynamo(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (apart if "torch._dynamo" in sys.modules else function)(*args, **kwargs)

    return cast(F, call)


def unless_repeated(batch: Moments) -> Moments:
    """The batch, but an empty one where the compiled code runs to repeat a forward.

    An empty batch leaves the running statistics as they are.
    """
    return Unread(_unless_repeated(batch.count), batch.mean, batch.m2)


def constant(t: Tensor) -> Tensor:
    """t as a value that the backward pass keeps.

    Compiled code would otherwise compute it anew, from running statistics that have moved since.
    """
    return _constant(t)


@torch.library.custom_op("syncnorm::unless_repeated", mutates_args=())
def _unless_repeated(count: Tensor) -> Tensor:
    return count.clone() if backward_pass() == -1 else torch.zeros_like(count)


@torch.library.custom_op("syncnorm::constant", mutates_args=())
def _constant(t: Tensor) -> Tensor:
    if backward_pass() != -1:
        raise InputError(
            "`checkpoint` must not repeat a renormalisation that is compiled, got both. The "
            "repetition would see "
            "running statistics that have moved since: leave the layer out of one of them."
        )
    return t.clone()


@_unless_repeated.register_fake
def _(count: Tensor) -> Tensor:
    return torch.empty_like(count)


@_constant.register_fake
def _(t: Tensor) -> Tensor:
    return torch.empty_like(t)
