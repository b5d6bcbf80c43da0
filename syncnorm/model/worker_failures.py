"""Sums over workers, some of which may have failed on the way there."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from syncnorm.comm import exchange, groups
from syncnorm.errors import FaultError


class NotFiniteFault(FaultError):
    """Activations are NaN or infinite on some worker; raised by all."""


def check_finite(totals: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse sums over all workers that are not finite.

    Args:
        totals: each with the name of its layer.

    Raises:
        NotFiniteFault: some are not; the same on all workers.
    """
    for name, total in totals:
        if not total.isfinite().all():
            raise NotFiniteFault(
                f"activations must be finite, got NaN or infinity at {name!r} on some worker. Look "
                "at the samples, and at the model's weights. Nothing was changed."
            )


def sum_unless_failed(
    message: Tensor, failure: Exception | None, group: groups.Group | None, kind: str
) -> Tensor:
    """Sum what workers collected from their batches; an error of one is raised on all of them.

    *Collectives*: one all-reduce of the message and a number for each worker; every worker must
    call, also one that failed.

    Args:
        message: float64, of one size on all workers.
        failure: what ended this worker's batches, or None.
        group: the workers; None: this one alone.
        kind: of the payload, see `exchange.Exchange`.

    Raises:
        FaultError: another worker failed. The failing one raises its own error.
    """
    members = groups.ranks(group)
    failures = torch.zeros(len(members), dtype=message.dtype, device=message.device)
    failures[members.index(groups.rank())] = failure is not None
    total = exchange.sum_(torch.cat([message, failures]), group, kind)
    message, failures = total.split([message.numel(), len(members)])
    if failure is not None:
        raise failure
    failed = [rank for rank, has in zip(members, failures.tolist(), strict=True) if has]
    if failed:
        raise FaultError(
            "`batches` must pass through the model on every worker, got an error on rank(s) "
            f"{failed}. Nothing was changed; see the error there."
        )
    return message
