"""A worker does not outlive the process that started it."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(launcher_pid: int | None) -> None:
    """Have the kernel end this process when its parent dies, however that happens. Linux only.

    Elsewhere, a launcher that is killed outright leaves its workers to the timeouts of their
    exchanges.

    Args:
        launcher_pid: the parent, if known: it may be dead already.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if launcher_pid is not None and os.getppid() != launcher_pid:
        sys.exit(1)
