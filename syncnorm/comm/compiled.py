"""The sum as an operator of compiled code; registered with the package `syncnorm.comm`."""

from __future__ import annotations

import torch
from torch import Tensor

from syncnorm import undocumented
from syncnorm.comm.exchange import sum_
from syncnorm.comm.groups import statistics_group
from syncnorm.comm.handles import of_name


@torch.library.custom_op("syncnorm::sum", mutates_args=())
def _sum(message: Tensor, group: str, kind: str, name: str) -> Tensor:
    """Sum as `exchange.sum_` over the group of this name, counted and timed as the graph runs."""
    total = sum_(message, statistics_group(of_name(group)), kind, name)
    return total.clone() if total is message else total  # an operator's output is no input of it


@_sum.register_fake
def _(message: Tensor, group: str, kind: str, name: str) -> Tensor:
    undocumented.keep_order_in_inductor(torch.ops.syncnorm.sum.default)
    return torch.empty_like(message)


# The same sums on all ranks, in the same order: also where the result is not used, and where ranks
# have compiled for different shapes.
undocumented.keep_order(_sum)
