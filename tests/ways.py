"""What the ranks of these tests are without: see `ways` in noxfile.py."""

from __future__ import annotations

import sys
from pathlib import Path

from syncnorm.comm import shared


def is_mixed() -> bool:
    """True if rank 1 of each process group is without the native library."""
    started_by = getattr(sys.modules.get("sitecustomize"), "__file__", None) or ""
    return Path(started_by).parent == Path(__file__).parent / "mixed"


def refusal() -> str:
    """The reason why ranks share no memory; empty if they do."""
    return "rank 1 is without the native library" if is_mixed() else shared.refusal()
