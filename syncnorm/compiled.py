"""torch.compile support: operators for what is known, or done, only when compiled code runs.

Its exchanges are in `syncnorm.comm`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncnorm.errors import InputError
from syncnorm.maths.moments import Moments, Unread
from syncnorm.undocumented import backward_pass, ignore_in_selective_checkpoints


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


# Both ask whether they are repeated: nobody may give them what came of the first forward.
for _operator in (torch.ops.syncnorm.unless_repeated, torch.ops.syncnorm.constant):
    ignore_in_selective_checkpoints(_operator.default)


@_unless_repeated.register_fake
def _(count: Tensor) -> Tensor:
    return torch.empty_like(count)


@_constant.register_fake
def _(t: Tensor) -> Tensor:
    return torch.empty_like(t)
