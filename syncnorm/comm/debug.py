"""Debug mode: checks that cost time or a look at values, and warnings that become errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from syncnorm.errors import InputError

# Attributes: every exchange of a layer asks.
is_on: bool = os.environ.get("SYNCNORM_DEBUG", "0") not in ("", "0")
"""True in debug mode, which must be on or off on all ranks alike."""
wait_seconds: float | None = None
"""The time that debug mode waits for a rank; None for the process group's timeout."""


@contextmanager
def debug(enabled: bool = True, *, timeout_seconds: float | None = None) -> Iterator[None]:
    """Turn debug mode on, or off, within the block; `SYNCNORM_DEBUG=1` does for the whole process.

    In debug mode

    - ranks agree on each exchange before they make it. If they disagree about it, or one has not
      come within `timeout_seconds`, every rank that is in an exchange, or comes to one later,
      raises the same `ExchangeError`, which names the exchange of each rank;
    - a statistic over a single value per channel is an error on all ranks rather than a warning;
    - NaN or infinity in one rank's input is an error on all ranks, which names layer and rank;
    - faults in the data are looked for on CUDA too, at the price of a host synchronisation.

    *Collectives*: none; ranks agree through the Store of the process group, which takes about a
    millisecond for each exchange. All ranks must be in debug mode, or none.

    Args:
        enabled: turn it on or off.
        timeout_seconds: > 0, the time to wait for a rank; None: the timeout of the process group.

    Raises:
        InputError: `timeout_seconds` is not positive.

    Example:
        >>> import torch
        >>> from syncnorm import SyncBatchNorm
        >>> with debug(timeout_seconds=30):
        ...     y = SyncBatchNorm(3)(torch.randn(8, 3))
    """
    global is_on, wait_seconds
    if timeout_seconds is not None and not timeout_seconds > 0:
        raise InputError(
            f"`timeout_seconds` must be > 0, got {timeout_seconds}. None waits as the process "
            "group does."
        )
    before = is_on, wait_seconds
    is_on, wait_seconds = enabled, timeout_seconds
    try:
        yield
    finally:
        is_on, wait_seconds = before
