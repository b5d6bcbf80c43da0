"""A process plays another operating system: what that one lacks is taken away from it.

`python -m tests.unit.other_system NAME FOLDER` does what a user of that system would, and prints
what came of it, as JSON. The standard library and torch are imported before, as those of this
system; so it is syncnorm that is tried, not they.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import sysconfig
from multiprocessing import resource_tracker
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.elastic.multiprocessing.redirects  # which torch 2.15 imports late
import torch.nn.functional as F

NO_LINUX = ("sched_getaffinity", "sched_setaffinity", "memfd_create", "pidfd_open")
NO_POSIX = (
    *("fork", "forkpty", "register_at_fork", "getuid", "geteuid", "getgid", "getpgid", "killpg"),
    *("setsid", "mkfifo", "pread", "pwrite", "fchmod", "statvfs", "uname", "sysconf", "nice"),
    *("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY", "getloadavg"),
)
NO_SIGNALS = (
    *("pthread_sigmask", "setitimer", "alarm", "sigwait", "ITIMER_REAL"),
    *("SIG_BLOCK", "SIG_UNBLOCK", "SIG_SETMASK"),
    *("SIGKILL", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGCHLD", "SIGUSR1", "SIGUSR2"),
)
NO_MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "pty", "_posixshmem")
LINUX_FOLDERS = ("/proc", "/sys", "/dev/shm")


def become(name: str) -> None:
    """Take away from this process what `name`, win32 or darwin, does not have."""
    sys.platform = name
    for each in NO_LINUX:
        _drop(os, each)
    for each in ("open", "iterdir", "readlink", "is_dir", "glob"):
        _hide(each)
    ctypes.CDLL = _Library  # pyright: ignore[reportAttributeAccessIssue]
    if name != "win32":
        return
    for each in NO_POSIX:
        _drop(os, each)
    for each in NO_SIGNALS:
        _drop(signal, each)
    for each in NO_MODULES:
        sys.modules[each] = None  # pyright: ignore[reportArgumentType] not to be imported
    for each in ("ForkContext", "ForkServerContext"):
        _drop(multiprocessing.context, each)
    os.environ["SYNCNORM_NATIVE"] = "0"


def _drop(module: Any, name: str) -> None:
    if hasattr(module, name):
        delattr(module, name)


def _hide(method: str) -> None:
    """Let the folders that only Linux has look absent to a method of paths."""
    real = getattr(pathlib.Path, method)

    def looks(path: pathlib.Path, *arguments: Any, **options: Any) -> Any:
        if str(path).startswith(LINUX_FOLDERS):
            if method == "is_dir":
                return False
            raise FileNotFoundError(str(path))
        return real(path, *arguments, **options)

    setattr(pathlib.Path, method, looks)


class _Library(ctypes.CDLL):
    """A shared library without the functions of Linux's own."""

    def __getattr__(self, name: str) -> Any:
        if name in ("prctl", "mallopt"):
            raise AttributeError(name)
        return super().__getattr__(name)


def pooled_step(rank: int) -> None:
    """Hold a step of two workers, with convert and DDP, against one process with the whole batch."""
    import syncnorm

    generator = torch.Generator().manual_seed(1)
    inputs, cotangent = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=generator)
    whole = inputs.clone().requires_grad_()
    expected = F.batch_norm(whole, None, None, training=True)
    expected.backward(cotangent)
    mine = slice(2 * rank, 2 * rank + 2)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3).double())
    model = syncnorm.prepare_ddp(syncnorm.convert(model))
    shard = inputs[mine].clone().requires_grad_()
    output = model(shard)
    output.backward(cotangent[mine])
    torch.testing.assert_close(output, expected[mine])
    torch.testing.assert_close(shard.grad, whole.grad[mine])


def _two_workers(folder: str, fork: Any) -> list[int]:
    """The exit statuses of two workers that meet in a file and take a step by gloo."""
    started = []
    for rank in range(2):
        if process := fork():
            started.append(process)
            continue
        status = 1
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
            )
            pooled_step(rank)
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    return [os.waitstatus_to_exitcode(os.waitpid(each, 0)[1]) for each in started]


def _said(call: Any) -> list[Any]:
    """How a call ended: its exit status, and what it said or raised."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            call()
    except SystemExit as stop:
        return [stop.code, errors.getvalue()]
    except Exception as error:
        return [type(error).__name__, str(error)]
    return [0, errors.getvalue()]


def step_in_pool() -> int:
    """A step on one rank of a pool; the number of its ranks."""
    pooled_step(dist.get_rank())
    return dist.get_world_size()


def main(name: str, folder: str, *more: str) -> None:
    """Use syncnorm on that system, with `pool` its pool of ranks alone."""
    torch.set_num_threads(1)
    if more == ("pool",):
        # What this system's way to start processes asks for, and would not find.
        resource_tracker.ensure_running()
        become(name)
        from syncnorm.testing import RankPool

        with RankPool(2) as pool:
            print(json.dumps({"pool": pool.run(step_in_pool)}))
        return
    fork = os.fork
    become(name)
    import syncnorm
    from syncnorm import system
    from syncnorm.__main__ import main as command
    from syncnorm.comm import shared

    facts = {
        "workers": _two_workers(folder, fork),
        "shared memory": shared.refusal(),
        "fit": _said(lambda: syncnorm.fit),
        "train": _said(lambda: __import__("syncnorm.train")),
        "run": _said(lambda: __import__("syncnorm.run.local")),
        "command": _said(lambda: command(["train", "digits", "--no-such-option"])),
        "cores": system.count_cores(),
    }
    print(json.dumps(facts))


# Read once, from a file that has the system in its name.
sysconfig.get_config_vars()
if __name__ == "__main__":
    main(*sys.argv[1:])
elif __name__ == "__mp_main__":  # a spawned process
    become(sys.argv[1])
