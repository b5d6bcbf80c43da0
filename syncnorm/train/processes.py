"""Ties between processes: one that dies with its parent."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(expected: int | None = None) -> None:
    """Let the kernel kill this process when its parent dies, however that happens. Linux only.

    Args:
        expected: the parent's id, if it is known: it may be dead already.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if expected is not None and os.getppid() != expected:
        sys.exit(1)
