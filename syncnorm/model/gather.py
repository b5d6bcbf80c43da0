"""The samples of all workers on each of them, for losses that look across the batch."""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from syncnorm.comm import exchange, groups
from syncnorm.errors import FaultError, InputError
from syncnorm.undocumented import disable_dynamo


@disable_dynamo
def gather(x: Tensor, process_group: groups.Spec = None) -> Tensor:
    """Gather the rows of all workers, in rank order, with gradients.

    For a loss that compares samples of the whole batch, such as a contrastive one. Each worker
    computes the terms of its own rows against all rows; the sum over the workers is the loss of
    the whole batch, and so is its gradient:

        keys = syncnorm.gather(features)  # (N, D)
        loss = F.cross_entropy(features @ keys.T, own_rows, reduction="sum")  # of this worker

    *Collectives*: two all-gathers in the forward pass (the numbers and shapes of rows, and the rows
    as float64), one all-reduce in the backward pass; every worker must call, and all or none must run
    the backward pass. *Gradients*: of a row, the sum of all workers' gradients of its copies. Once
    differentiable.

    Args:
        x: (n, *S), floating; n may differ between workers and be 0, S is the same on all.
        process_group: the workers; None: all of them.

    Returns:
        (N, *S), the rows of all workers; `x` itself on a single worker.

    Raises:
        InputError: `x` has no rows, or is not floating.
        FaultError: on every worker, if rows have other shapes on some.

    Example:
        >>> import torch
        >>> gather(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    if x.ndim < 1 or not x.is_floating_point():
        raise InputError(f"`x` must be floating, (n, *S), got shape {tuple(x.shape)} of {x.dtype}")
    group = groups.statistics_group(process_group)
    return x if group is None else _Gather.apply(x, group)  # pyright: ignore[reportReturnType]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        shape = tuple(x.shape[1:])
        own = [len(x), math.prod(shape), zlib.crc32(repr(shape).encode())]
        sent = torch.tensor(own, dtype=torch.float64, device=x.device)
        sizes, numbers, shapes = (
            list(map(int, each)) for each in exchange.gather(sent, group, "rows").t().tolist()
        )
        # One that has left the loop, within `join`, sends zeros.
        if len({each for each in shapes if each}) > 1:
            given = zip(groups.ranks(group), numbers, strict=True)
            raise FaultError(
                "`x` must have rows of one shape on all workers, got rows of "
                f"{', '.join(f'{number} numbers on rank {rank}' for rank, number in given)}"
            )
        padded = x.new_zeros(max(sizes), *x.shape[1:], dtype=torch.float64)
        padded[: len(x)] = x
        rows = exchange.gather(padded, group, "rows")  # (workers, most rows, *S)
        start = sum(sizes[: groups.ranks(group).index(groups.rank())])
        ctx.group, ctx.own = group, slice(start, start + len(x))
        return torch.cat([part[:size] for part, size in zip(rows, sizes)]).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None]:
        total = exchange.sum_(grad.double().flatten(), ctx.group, "rows")
        return total.view(grad.shape)[ctx.own].to(grad.dtype), None
