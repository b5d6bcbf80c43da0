"""Data of one worker that is at fault: one error, the same on every worker."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from syncnorm.comm import debug, exchange, groups
from syncnorm.errors import FaultError
from syncnorm.maths import kernels

_MAX_DIMS = 8


def check(
    total: Tensor, sums: Tensor, mask: Tensor | None, group: groups.Group | None, name: str
) -> None:
    """Raise if some worker's data is at fault. Looks at values.

    *Collectives*: a second message, only where something is at fault, to say whose.

    Args:
        total: the pooled sums, in which a fault is a count of NaN.
        sums: this worker's.
        mask: as it was given to this worker.
        group: the workers; None: this one.
        name: the layer, for the error.

    Raises:
        FaultError: on every worker.
    """
    if not (math.isnan(total[-1]) or (debug.is_on and not total.isfinite().all())):
        return
    report = torch.zeros(3 + _MAX_DIMS, dtype=torch.float64, device="cpu")
    report[0] = not sums[:-1].isfinite().all()
    if mask is not None:
        wrong = mask[~kernels.is_weight(mask)]
        if wrong.numel():
            report[1], report[2] = 1.0, wrong[0]
            shape = mask.shape[:_MAX_DIMS]
            report[3 : 3 + len(shape)] = torch.tensor(shape, device="cpu")
    reports = exchange.gather(report.to(sums), group, "fault", name).tolist()
    masks, inputs = [], []
    for rank, (is_input, is_mask, value, *shape) in zip(groups.ranks(group), reports, strict=True):
        if is_mask:
            masks.append(f"{value:g} (shape {tuple(int(s) for s in shape if s)}, rank {rank})")
        if is_input:
            inputs.append(rank)
    if masks:
        raise FaultError(
            f"`mask` must hold finite weights >= 0, got {', '.join(masks)} in {name}. "
            "Give weight 0 to elements that should not count. Nothing was updated."
        )
    raise FaultError(
        f"`x` must be finite (debug mode), got NaN or infinity on rank(s) {inputs} in {name}. "
        "Look at what comes before that layer, on those ranks. Nothing was updated."
    )
