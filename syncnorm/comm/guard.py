"""Debug mode: checks that cost time or a look at values, and warnings that become errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_enabled = os.environ.get("SYNCNORM_DEBUG", "0") not in ("", "0")


def is_debug() -> bool:
    """Whether debug mode is on. It must be the same on all workers."""
    return _enabled


@contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Turn debug mode on (or off) within the block; `SYNCNORM_DEBUG=1` turns it on for a whole process.

    In debug mode a statistic over a single value per channel is an error on all workers rather than a
    warning, and faults in the data are looked for on CUDA too, at the price of a host synchronisation.
    """
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before
