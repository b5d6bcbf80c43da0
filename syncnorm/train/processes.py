"""Processes that die with their parent, and work that one of them does."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from concurrent import futures
from typing import TypeVar

_PR_SET_PDEATHSIG = 1

T = TypeVar("T")


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


def call_apart(function: Callable[..., T], *args: object) -> T:
    """Call a function in a process of its own, on Linux: elsewhere it is called here.

    For what leaves threads behind, as libraries of stores do: a process with threads cannot be
    forked. Arguments and result are pickled; an exception is raised here.
    """
    if not sys.platform.startswith("linux"):
        return function(*args)
    context = multiprocessing.get_context("fork")
    with futures.ProcessPoolExecutor(1, context, die_with_parent, (os.getpid(),)) as pool:
        return pool.submit(function, *args).result()
