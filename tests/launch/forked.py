"""Commands of Python's as forks of a process that has imported what they import.

The import of torch and its compiler takes a core three seconds, which few tests are about.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler


def serve() -> None:
    """Start multiprocessing's server, which goes on by itself. Ranks of pools are its forks, too:
    it must be first here.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.launch.served"])
    forkserver.ensure_running()


class _Process:
    """A fork, waited for as a `Popen` is."""

    _process: BaseProcess

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """As `Popen` has it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return `returncode`."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return self.returncode


class Forked(_Process):
    """What `python -m` would run, in a session of its own; it is used as a `Popen` is.

    Args:
        arguments: the module's name, and those of its command line.
        folder: in which it works.
        environment: all of it.
    """

    def __init__(
        self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        (out, their_out), (err, their_err), (birth, their_birth) = (
            context.Pipe(duplex=False) for _ in range(3)
        )
        theirs = (their_out, their_err, their_birth)
        self._process = context.Process(
            target=_become, args=(list(arguments), folder, dict(environment), *theirs)
        )
        self._process.start()
        for pipe in theirs:
            pipe.close()
        birth.poll(None)  # until its end is closed
        self.stdout, self.stderr = (os.fdopen(os.dup(pipe.fileno())) for pipe in (out, err))

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Read what is written until nobody has its pipes any more, and wait for its end."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for reader in self._readers:
            reader.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        self.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return self._said[self.stdout], self._said[self.stderr]

    @cached_property
    def _readers(self) -> list[threading.Thread]:
        self._said = {}
        readers = [
            threading.Thread(target=lambda of=of: self._said.update({of: of.read()}), daemon=True)
            for of in (self.stdout, self.stderr)
        ]
        for reader in readers:
            reader.start()
        return readers

    def send_signal(self, number: int) -> None:
        """Send a signal, if it has not ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _become(
    arguments: list[str],
    folder: Path,
    environment: dict[str, str],
    out: Connection,
    err: Connection,
    birth: Connection,
) -> None:
    """Make this new process what `python -m` would be."""
    for pipe, number in ((out, 1), (err, 2)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    os.chdir(folder)
    _begin(arguments, environment)
    birth.close()
    if arguments[0] == "torch.distributed.run":
        handler: Any = SubprocessHandler
        handler._popen = lambda *of: _TorchrunWorker(*of)
    _run(arguments[0], is_module=True)


def _begin(arguments: list[str], environment: Mapping[str, str]) -> None:
    os.setsid()
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    sys.path.insert(0, str(Path.cwd()))
    sys.argv = arguments
    atexit._clear()  # of the process that this is a fork of


def _run(program: str, *, is_module: bool) -> None:
    """Run a module or a file, and what it leaves for the end, which a fork would leave out."""
    try:
        if is_module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program, run_name="__main__")
    finally:
        atexit._run_exitfuncs()


class _TorchrunWorker(_Process):
    """A worker of torchrun as a fork of it, in place of a new Python.

    Args:
        handler: torchrun's, with the files that the worker writes to, if it has some.
        words: of its command line.
        environment: all of it.
    """

    def __init__(
        self, handler: SubprocessHandler, words: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_work, args=(handler, words, environment))
        self._process.start()


def _work(handler: SubprocessHandler, words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Make this fork of torchrun what a new Python with these words would be."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for file, number in ((handler._stdout, 1), (handler._stderr, 2)):
        if file is not None:
            os.dup2(file.fileno(), number)
    _, unbuffered, *arguments = words
    assert unbuffered == "-u"
    is_module = arguments[0] == "-m"
    _begin(arguments[is_module:], environment)
    _run(arguments[is_module], is_module=is_module)
