"""Debug mode: checks that cost time or a look at values, and warnings that become errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from syncnorm.errors import InputError

_enabled = os.environ.get("SYNCNORM_DEBUG", "0") not in ("", "0")
_timeout_seconds: float | None = None


def is_debug() -> bool:
    """Whether debug mode is on. It must be the same on all workers."""
    return _enabled


def debug_timeout_seconds() -> float | None:
    """How long debug mode waits for a worker; None: as long as the process group does."""
    return _timeout_seconds


@contextmanager
def debug(enabled: bool = True, *, timeout_seconds: float | None = None) -> Iterator[None]:
    """Turn debug mode on (or off) within the block; `SYNCNORM_DEBUG=1` turns it on for a whole
    process.

    In debug mode

    - workers agree on each exchange before they make it. If they disagree about it, or one has not
      come within `timeout_seconds`, every worker that is in an exchange, or comes to one later,
      raises the same `ExchangeError`, which says which rank is where;
    - a statistic over a single value per channel is an error on all workers rather than a warning;
    - faults in the data are looked for on CUDA too, at the price of a host synchronisation.

    *Collectives*: none, but some words with the others through the Store of the process group,
    about a millisecond for each exchange. Every worker must be in debug mode alike.

    Args:
        enabled: whether debug mode is on within the block.
        timeout_seconds: > 0, how long to wait for a worker; None: the timeout of the process group.

    Raises:
        InputError: `timeout_seconds` is not positive.

    Example:
        >>> with debug(timeout_seconds=30):
        ...     is_debug()
        True
    """
    global _enabled, _timeout_seconds
    if timeout_seconds is not None and not timeout_seconds > 0:
        raise InputError(
            f"`timeout_seconds` must be > 0, got {timeout_seconds}. None waits as the process "
            "group does."
        )
    before = _enabled, _timeout_seconds
    _enabled, _timeout_seconds = enabled, timeout_seconds
    try:
        yield
    finally:
        _enabled, _timeout_seconds = before
