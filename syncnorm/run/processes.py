"""Worker processes of this machine: started, watched and ended by a launcher.

On Linux they are forked from the launcher, which has imported all that they need: an import of
torch takes seconds of a core, and each restart would take them again.
"""

import ctypes
import importlib
import multiprocessing
import os
import platform
import signal
import socket
import time
from collections.abc import Callable, Collection, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from syncnorm import system
from syncnorm.run import env
from syncnorm.run.interrupt import STOP_SIGNALS, Stopped

# After a first failure the others get so long to fail by themselves: who ends first may only have
# lost its peer.
_LAST_WORDS_SECONDS = 1.0
_LOOK_SECONDS = 0.5

# Parameters of mallopt(3) and the values that stand for no limit, by glibc's variable for the same.
_MALLOPT = {
    "MALLOC_MMAP_THRESHOLD_": (-4, 0),  # M_MMAP_MAX
    "MALLOC_TRIM_THRESHOLD_": (-1, -1),  # M_TRIM_THRESHOLD
    "MALLOC_TOP_PAD_": (-2, 268435456),  # M_TOP_PAD
}


def can_fork(device: torch.device) -> bool:
    """Return True if workers on this device can be forked from this process.

    Threads do not live on in a fork, and locks that they hold stay locked. CUDA cannot be used in a
    fork of a process that has asked it for its devices.
    """
    return system.is_linux() and device.type == "cpu" and not system.has_threads()


def prepare_to_fork() -> None:
    """Import what a worker does in its first step, and tune the memory that it inherits."""
    # DDP and the optimizers import it.
    importlib.import_module("torch._dynamo")
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for name in env.read_tuning().missing_malloc:
            libc.mallopt(*_MALLOPT[name])


def run_processes(
    work: Callable[[], object], count: int, logs: Path, forks: bool, patience_seconds: float
) -> None:
    """Start a process for each rank, and wait until all have ended.

    Args:
        work: called in each process, with the rank in the environment; can be pickled.
        count: of processes.
        logs: a folder for their error files.
        forks: `can_fork`; otherwise they are spawned.
        patience_seconds: from a signal to stop to SIGKILL.

    Raises:
        ChildFailedError: one failed; the others were ended.
        Stopped: this process got a signal to stop, and passed it on.
    """
    if forks:
        context = multiprocessing.get_context("fork")
    else:
        context = multiprocessing.get_context("spawn")
        # Started with the first process otherwise, and lets signals through that are blocked below.
        resource_tracker.ensure_running()
    port = _free_port()
    places = [env.Place(rank, count, port, logs / f"{rank}.json") for rank in range(count)]
    started: list[BaseProcess] = []
    try:
        # A signal waits until this process knows whom to pass it on to, and a worker how to take it.
        with system.blocked(STOP_SIGNALS):
            for place in places:
                process = context.Process(
                    target=_begin, args=(work, place), name=f"worker-{place.rank}"
                )
                process.start()
                started.append(process)
        failed = _wait_for_end(started)
        _end(started, (signal.SIGTERM,), patience_seconds)
    except Stopped as stopped:
        _end(started, stopped.passed_on, patience_seconds)
        raise
    finally:
        for process in started:
            process.kill()
            process.join()
    failures = {
        place.rank: ProcessFailure(
            place.rank, process.pid or 0, process.exitcode or 0, str(place.error_file)
        )
        for place, process in zip(places, started, strict=True)
        if process in failed
    }
    if failures:
        raise ChildFailedError("syncnorm", failures)


def _begin(work: Callable[[], object], place: env.Place) -> None:
    """Make this new process the worker of a rank."""
    # A worker ignores Ctrl-C until it has a handler (see run/watchdog.py).
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in STOP_SIGNALS:
        # What the launcher ignores, as under nohup, stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    system.unblock(STOP_SIGNALS)
    system.name_process(f"syncnorm-{place.rank}")
    env.set_place(place)
    # A fork has the number that its launcher imported torch with.
    torch.set_num_threads(env.read_threads())
    # Otherwise the forks of one process draw the same.
    np.random.seed()
    work()


def _wait_for_end(processes: Sequence[BaseProcess]) -> list[BaseProcess]:
    """Wait until all processes are done, or one has failed and the others had their last words.

    Returns:
        Those that have failed by then, before anybody ended them.
    """
    running, failed = set(processes), []
    deadline = float("inf")
    while running and (left := deadline - time.monotonic()) > 0:
        _wait_for_one(running, left)
        for process in list(running):
            if process.exitcode is not None:
                running.remove(process)
                if process.exitcode != 0:
                    failed.append(process)
                    deadline = min(deadline, time.monotonic() + _LAST_WORDS_SECONDS)
    return failed


def _wait_for_one(running: Collection[BaseProcess], seconds: float) -> None:
    """Wait until one may have ended, `seconds` at most.

    A process that it has started itself holds its sentinel open: hence the look now and then.
    """
    wait([process.sentinel for process in running], min(seconds, _LOOK_SECONDS))


def _end(processes: Sequence[BaseProcess], numbers: Sequence[int], patience_seconds: float) -> None:
    """Send signals to the processes that still run, and wait for their end, not for ever."""
    running = [process for process in processes if process.exitcode is None]
    for process in running:
        for number in numbers:
            os.kill(process.pid, number)  # pyright: ignore[reportArgumentType] started, not waited for
    deadline = time.monotonic() + patience_seconds
    while running and (left := deadline - time.monotonic()) > 0:
        _wait_for_one(running, left)
        running = [process for process in running if process.exitcode is None]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
