"""Paired timing as `syncnorm bench` has it, and the allocator's settings that scripts need for it."""

from __future__ import annotations

import os
import resource
import sys

from syncnorm.bench.paired import Ratio, ratio, rounds
from syncnorm.run import env

__all__ = ["Ratio", "fix_allocator", "page_faults", "ratio", "rounds", "settings"]

MOST_SECONDS = 24 * 3600.0
"""For a call of a pool of ranks that measures: whoever asked for the rounds waits for them."""


def fix_allocator() -> None:
    """Restart this program with glibc's allocator told to keep memory, unless it already is."""
    wanted = env.ray_worker_environment()
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def settings() -> str:
    """The allocator's settings in force, for the head of a table."""
    return ", ".join(
        f"{name}={os.environ.get(name, 'unset')}" for name in env.ray_worker_environment()
    )


def page_faults() -> int:
    """Minor page faults of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
