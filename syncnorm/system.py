"""The operating system: what only some have passes here, with what stands in for it elsewhere.

The library works wherever torch has gloo. The trainer and the command need POSIX, for they lock
files and stop by signals: `require_posix` says so where they are imported. On POSIX, what only
Linux has makes them faster or more careful, and nothing needs it.

Nothing here imports torch, which takes seconds.
"""

from __future__ import annotations

import ctypes
import errno
import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

try:
    import fcntl
    import resource
except ImportError:  # not POSIX
    fcntl = resource = None

_PR_SET_PDEATHSIG = 1

T = TypeVar("T")


def is_posix() -> bool:
    """True on Linux, macOS and their like."""
    return fcntl is not None


def refusal(part: str) -> str:
    """The sentence that `part` of syncnorm does not work on this system; empty if it does."""
    if is_posix():
        return ""
    return (
        f"{part} needs Linux or macOS, because it locks files and stops by signals, got "
        f"{sys.platform}. Train with a loop of your own: the layers work here."
    )


def require_posix(part: str) -> None:
    """Raise ImportError where `part`, which is being imported, does not work."""
    if sentence := refusal(part):
        raise ImportError(sentence)


def is_linux() -> bool:
    """True on Linux, where processes fork safely, die with their parents and share memory."""
    return sys.platform == "linux"


def prepare_standard_streams() -> None:
    """Have this process's standard streams take whatever is printed.

    One that it was started without, as by `command >&-`, drops it. Otherwise the first file or
    socket that is opened takes the stream's number, and what libraries print goes into that. A
    letter that the encoding has not is printed by its number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            os.set_inheritable(null, True)
            setattr(sys, name, open(null, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def tell(text: str, *, is_result: bool = False) -> None:
    """Print what a run has to say: where nobody reads any more, or there is no room, it goes on.

    Args:
        text: of one or more lines.
        is_result: True for standard output.
    """
    stream = sys.stdout if is_result else sys.stderr
    if stream is None:
        return
    try:
        print(text, file=stream, flush=True)
    except UnicodeEncodeError:
        tell(text.encode("ascii", "backslashreplace").decode(), is_result=is_result)
    except OSError as error:
        is_gone = error.errno == errno.EPIPE or (is_result and error.errno == errno.ENOSPC)
        if is_gone and (stream is sys.__stdout__ or stream is sys.__stderr__):
            with suppress(OSError, ValueError):
                send_nowhere(stream.fileno())
    except ValueError:  # it is closed
        pass


def send_nowhere(descriptor: int) -> None:
    """Let what is left for an open file go nowhere, so that the process does not fail of it."""
    with Path(os.devnull).open("w") as null:
        os.dup2(null.fileno(), descriptor)


def flush_streams() -> None:
    """Flush standard output and error, where they are there and open."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not getattr(stream, "closed", False):
            stream.flush()


def leads_to_open_file(path: Path) -> bool:
    """True for a link to a file that a process has open, as /dev/stdout is."""
    return path.is_symlink() and str(path.readlink()).startswith("/proc/")


def lock(descriptor: int, *, waits: bool = False) -> None:
    """Lock an open file or folder against all processes and threads on this machine.

    Args:
        descriptor: of the file.
        waits: until nobody else holds the lock.

    Raises:
        BlockingIOError: somebody else holds it, and this does not wait.
        OSError: the file system has no locks.
    """
    assert fcntl is not None
    fcntl.flock(descriptor, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)


def unlock(descriptor: int) -> None:
    """Give the lock of `lock` back.

    Closing alone does not do: a process forked meanwhile has the descriptor too, and with it the
    lock.
    """
    assert fcntl is not None
    fcntl.flock(descriptor, fcntl.LOCK_UN)


@contextmanager
def blocked(signals: Iterable[int]) -> Iterator[None]:
    """Let signals wait until the end of the block; processes started in it begin with them blocked.

    Where signals cannot be blocked, nothing happens.
    """
    before = _mask("SIG_BLOCK", signals)
    try:
        yield
    finally:
        _mask("SIG_SETMASK", before)


def block(signals: Iterable[int]) -> None:
    """Let signals wait from now on."""
    _mask("SIG_BLOCK", signals)


def unblock(signals: Iterable[int]) -> None:
    """Let signals through that `blocked` or the parent of this process held."""
    _mask("SIG_UNBLOCK", signals)


def _mask(how: str, signals: Iterable[int]) -> Iterable[int]:
    if not hasattr(signal, "pthread_sigmask"):
        return ()
    return signal.pthread_sigmask(getattr(signal, how), signals)


def die_with_parent(expected: int | None) -> None:
    """Let the kernel kill this process when its parent dies, however that happens. Linux only.

    Args:
        expected: the parent's id, if it is known: it may be dead already.
    """
    if not is_linux():
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if expected is not None and os.getppid() != expected:
        sys.exit(1)


def call_apart(function: Callable[..., T], *args: object) -> T:
    """Call a function in a process of its own, on Linux: elsewhere it is called here.

    For what leaves threads behind, as libraries of stores do: a process with threads cannot be
    forked. Arguments and result are pickled; an exception is raised here.
    """
    if not is_linux():
        return function(*args)
    context = multiprocessing.get_context("fork")
    with futures.ProcessPoolExecutor(1, context, die_with_parent, (os.getpid(),)) as pool:
        return pool.submit(function, *args).result()


def has_threads() -> bool:
    """True if this process has more than one thread, also where that is not known."""
    try:
        return len(list(Path("/proc/self/task").iterdir())) != 1
    except OSError:
        return True


def name_process(name: str) -> None:
    """Name this process in `top`, where it can be done."""
    with suppress(OSError):
        Path("/proc/self/comm").write_text(name, encoding="ascii")


def boot_id() -> str:
    """An identifier of the running kernel's boot, the same in all containers; empty if not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def usable_cores() -> tuple[int, ...]:
    """The numbers of the cores that this process may use; those of the machine if not known."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def count_cores() -> float:
    """Count the cores that this process may use, within a container's quota."""
    number = float(len(usable_cores()))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return min(number, int(quota) / int(period))
    except (OSError, ValueError):  # no cgroup, or no quota ("max")
        return number


def processor() -> str:
    """The name of this machine's processor; empty if not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else ""


def resident_memory() -> int:
    """The resident memory of this process, in bytes; 0 where it is not known."""
    if resource is None:
        return 0
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * resource.getpagesize()
    except (OSError, ValueError):
        return 0


def peak_resident_memory() -> int:
    """The largest resident memory that this process had, in bytes; 0 where it is not known."""
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory() -> float:
    """Free memory of this machine or of its control group, in bytes; infinite if not known."""
    limits = [float("inf")]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits += [
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")
        ]
        group = Path("/sys/fs/cgroup")
        bound = (group / "memory.max").read_text(encoding="ascii").strip()
        if bound.isdecimal():
            limits.append(int(bound) - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass
    return min(limits)
