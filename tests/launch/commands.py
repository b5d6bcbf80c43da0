"""Run commands as a person would, and never leave one behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from syncnorm.cli import main
from tests.launch.forked import Forked

SYNCNORM = [sys.executable, "-m", "syncnorm"]
# --standalone: a free port instead of torchrun's fixed one
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# For what hangs; the machine may be busy with other things.
DEADLINE_SECONDS = 900

_LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@contextlib.contextmanager
def started(
    command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Any]:
    """Start a command in `folder`; on the way out it and its process group are ended.

    A module of Python's is a fork of a process that has imported torch, and so are torchrun's
    workers. With a PYTHONPATH of its own, which is read where Python starts, it is a new Python.
    """
    own = {**(environment or {})}
    whole = {name: each for name, each in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    whole.update(own)
    process: Any
    if list(command[:2]) == [sys.executable, "-m"] and "PYTHONPATH" not in own:
        process = Forked(command[2:], folder, whole)
    else:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=whole,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


class Called(NamedTuple):
    """What came of a command."""

    status: int
    out: str
    err: str


def call(capture: Any, *arguments: object) -> Called:
    """Run a command in this process, under `capsys` or `capfd`."""
    with pytest.raises(SystemExit) as caught:
        main([str(each) for each in arguments])
    return Called(int(caught.value.code or 0), *capture.readouterr())


def run(
    command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    with started(command, folder, environment) as process:
        out, err = process.communicate(timeout=DEADLINE_SECONDS)
        return subprocess.CompletedProcess(command, process.returncode, out, err)


def wait_while_alive(
    condition: Callable[[], bool], processes: Sequence[subprocess.Popen[str]], seconds: float
) -> None:
    """Wait for a condition; a process that ends before, or too long a time, is a failure."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        for each in processes:
            try:
                each.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
            raise AssertionError(
                f"a process ended with status {each.returncode}: {each.communicate()[1]}"
            )


def holder(path: Path) -> int:
    """The process that has a file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if link.readlink() == path:
                return int(link.parts[2])
    raise AssertionError(f"nobody has {path} open")
