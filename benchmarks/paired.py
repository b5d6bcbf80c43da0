"""Paired timing as `syncnorm bench` has it, and the allocator's settings that scripts need for it."""

from __future__ import annotations

import os
import resource
import sys

from syncnorm.bench.paired import Ratio, ratio, rounds

__all__ = ["Ratio", "fix_allocator", "page_faults", "ratio", "rounds", "settings"]

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


def fix_allocator() -> None:
    """Restart this program with glibc's allocator told to keep memory, unless it already is."""
    wanted = {**ALLOCATOR, "OMP_NUM_THREADS": "1"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def settings() -> str:
    """The allocator's settings in force, for the head of a table."""
    return ", ".join(f"{name}={os.environ.get(name, 'unset')}" for name in ALLOCATOR)


def page_faults() -> int:
    """Minor page faults of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
