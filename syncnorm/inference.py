"""Normalisation in evaluation: torch's own batch norm, and what it gets wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from syncnorm import checks, ops
from syncnorm.undocumented import is_jit_tracing, unseen_by_selective_checkpoint


@unseen_by_selective_checkpoint
def evaluate(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Normalise by the running statistics, or by the local batch without them. No communication."""
    if running_mean is None or running_var is None:
        checks.check_pair(running_mean, running_var)
        statistic = ops.local_statistic(ops.local_sums(x, None), "evaluation")
        return ops.normalize(x, weight, bias, statistic, eps, None)
    given = (running_mean, running_var, weight, bias)
    if any(t is not None and t.dtype != x.dtype for t in given):
        # F.batch_norm takes them all in the type of x, or all in float32 with a half x.
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        running_mean, running_var, weight, bias = (None if t is None else t.to(wide) for t in given)
    arguments = (running_mean, running_var, weight, bias, False, 0.0, eps)
    if _is_misread(x):
        if x.is_contiguous() or x.stride(1) != 1:
            return F.batch_norm(x.flatten(2), *arguments).view_as(x)
        # Channels last but for some strides, which a reshape sets right.
        by_row = x.movedim(1, -1).contiguous()
        x = by_row.reshape(by_row.shape).movedim(-1, 1)
    return F.batch_norm(x, *arguments)


def _is_misread(x: Tensor) -> bool:
    """True if torch's gradient may take x, or what comes back for it, for another layout.

    It does so for images on a CPU with sizes of 1, whose strides say nothing. Those that lie
    channels last, these sizes included, are safe. In code that others run it is theirs to see.
    """
    if torch.compiler.is_compiling() or is_jit_tracing():
        return False
    if not (x.is_cpu and x.ndim > 3 and 1 in x.shape and torch.is_grad_enabled()):
        return False
    size = 1
    for dim in (1, *range(x.ndim - 1, 1, -1), 0):
        if x.stride(dim) != size:
            return True
        size *= x.shape[dim]
    return False
