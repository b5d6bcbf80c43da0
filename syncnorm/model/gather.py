"""The samples of all workers on each of them, for losses that look across the batch."""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from torch import Tensor

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
    each backward pass. *Gradients*: of a row, the sum of all workers' gradients of its copies; of
    any order, where a gradient's own takes one all-gather, and so on in turn.

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
    if group is None:
        return x
    return _Gather.apply(x, group, _gather_sizes(x, group))  # pyright: ignore[reportReturnType]


def _gather_sizes(x: Tensor, group: Any) -> list[int]:
    """Gather the number of rows of each worker."""
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
    return sizes


class _Gather(torch.autograd.Function):
    """All workers' rows of each worker's own; its gradient is `_SumOfCopies`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, sizes: list[int]) -> Tensor:
        ctx.group, ctx.sizes = group, sizes
        padded = x.new_zeros(max(sizes), *x.shape[1:], dtype=torch.float64)
        padded[: len(x)] = x
        rows = exchange.gather(padded, group, "rows")  # (workers, most rows, *S)
        return torch.cat([part[:size] for part, size in zip(rows, sizes)]).to(x.dtype)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Any, None, None]:
        return _SumOfCopies.apply(grad, ctx.group, ctx.sizes), None, None


class _SumOfCopies(torch.autograd.Function):
    """A worker's own rows of the sum over all workers' copies; its gradient is `_Gather`."""

    @staticmethod
    def forward(ctx: Any, copies: Tensor, group: Any, sizes: list[int]) -> Tensor:
        ctx.group, ctx.sizes = group, sizes
        total = exchange.sum_(copies.double().flatten(), group, "rows").view(copies.shape)
        own = groups.ranks(group).index(groups.rank())
        return total.split(sizes)[own].to(copies.dtype)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Any, None, None]:
        return _Gather.apply(grad, ctx.group, ctx.sizes), None, None
