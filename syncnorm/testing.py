"""Tools for tests that span processes: a kept pool of ranks, tolerances, batches in shards.

    with RankPool(2) as pool:
        results = pool.run(function, *arguments)      # called on every rank; results by rank

The first pool of a process imports torch, which takes seconds; another starts in a fraction of one,
and a call into a kept pool costs milliseconds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing import resource_tracker, util
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm import system
from syncnorm.comm import inflight
from syncnorm.errors import SyncnormError

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext


class Tolerance(NamedTuple):
    """|got - expected| <= rtol * |expected| + atol * (largest |expected| of the tensor)."""

    rtol: float
    atol: float


TOLERANCES: dict[torch.dtype, Tolerance] = {
    # What a correct layer keeps to at |mean| / std <= 100, gradients included: 1e-10 of the largest
    # value.
    torch.float64: Tolerance(5e-11, 5e-11),
    torch.float32: Tolerance(2e-5, 2e-5),
    # Half types: rounding of the output (2^-9 and 2^-12), and of gradients that nearly cancel.
    torch.bfloat16: Tolerance(8e-3, 8e-3),
    torch.float16: Tolerance(1e-3, 1e-3),
}


def assert_close(
    got: Tensor, expected: Tensor, dtype: torch.dtype, what: str, factor: float = 1.0
) -> None:
    """Compare with the float64 truth, at the tolerance of `dtype` times `factor`.

    The absolute part is relative to the largest expected value (at least 0.01), so that gradients
    of any scale are judged alike. Shapes must agree, and NaN equals NaN only.

    Raises:
        AssertionError: with the largest error, where it is, and the bound.
    """
    assert got.shape == expected.shape, (
        f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    )
    worst = worst_difference(got, expected, dtype, factor)
    if worst is not None:
        raise AssertionError(
            f"{what}: {worst.number} of {got.numel()} elements are off; "
            f"at flat index {worst.position} "
            f"got {worst.got:.12g}, expected {worst.expected:.12g}, error {worst.error:.3g} over "
            f"the bound {worst.bound:.3g} ({dtype})"
        )


class Difference(NamedTuple):
    """The worst element of a tensor that is off, and the number of such elements."""

    got: float
    expected: float
    error: float
    bound: float
    position: int
    number: int


def worst_difference(
    got: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    factor: float = 1.0,
    scale: float | None = None,
) -> Difference | None:
    """Find the element that is furthest out of the tolerance of `dtype` times `factor`.

    Args:
        got, expected: of one shape, compared in float64.
        dtype: in which `got` was computed.
        factor: on the tolerance.
        scale: the largest value of the tensor that `expected` is a part of; its own if None.

    Returns:
        None if all elements are within the tolerance.
    """
    if got.numel() == 0:
        return None
    got, expected = got.detach().double().flatten(), expected.detach().double().flatten()
    if scale is None:
        finite = expected[expected.isfinite()]
        scale = finite.abs().max().item() if finite.numel() else 1.0
    tolerance = TOLERANCES[dtype]
    error = (got - expected).abs()
    bound = factor * (tolerance.atol * max(0.01, scale) + tolerance.rtol * expected.abs())
    is_same = (got == expected) | (got.isnan() & expected.isnan())
    is_off = ~is_same & ~((error <= bound) & expected.isfinite())
    if not is_off.any():
        return None
    ratio = (error / bound).nan_to_num(float("inf"), float("inf"))
    worst = int(torch.where(is_off, ratio, -1.0).argmax())
    g, e, off, allowed = (t[worst].item() for t in (got, expected, error, bound))
    return Difference(g, e, off, allowed, worst, int(is_off.sum()))


def shard(batch: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The batch cut along dimension 0 into shards of these sizes (0 allowed), layouts kept."""
    return [part.clone(memory_format=torch.preserve_format) for part in batch.split(list(sizes))]


# Until the ranks have imported what they need, on a machine however busy.
_START_SECONDS = 600.0


class RankFailure(SyncnormError):
    """A rank of a pool raised, died or did not answer; the pool has been ended.

    Args:
        answers: by rank, of those that answered.
        failures: by rank, a traceback or how the process ended.
        silent: ranks that did not answer.
    """

    answers: Mapping[int, Any]
    failures: Mapping[int, str]
    silent: list[int]

    def __init__(
        self,
        message: str,
        answers: Mapping[int, Any] | None = None,
        failures: Mapping[int, str] | None = None,
        silent: Sequence[int] = (),
    ) -> None:
        super().__init__(message)
        self.answers = answers or {}
        self.failures = failures or {}
        self.silent = list(silent)


class RankPool:
    """Processes that form a default process group and wait for functions to run.

    Each rank has one thread and its own pipe. Functions and arguments are pickled, so functions
    must be importable. A failure on any rank ends the pool: its collectives may be half done.

    On Linux the ranks of all pools are forks of multiprocessing's server, which has imported torch.
    A rank has the environment of its pool's start, but what is read at an import is read once.

    Args:
        world_size: number of ranks, at least 1.
        backend: of the default process group.
        timeout_seconds: deadline of a call, and of a collective within it.
        device: on which the functions compute. With "cuda", each rank's current device is the one
            of its number; where there are fewer devices than ranks, they share.
    """

    def __init__(
        self,
        world_size: int,
        backend: str = "gloo",
        timeout_seconds: float = 60.0,
        device: str = "cpu",
    ) -> None:
        self.world_size = world_size
        self.timeout_seconds = timeout_seconds
        self._folder = tempfile.TemporaryDirectory(prefix="syncnorm-pool-")
        rendezvous = str(Path(self._folder.name) / "rendezvous")
        self._pipes: list[Any] = []
        self._processes = []
        try:
            context = _context(device)
            for rank in range(world_size):
                here, there = context.Pipe()
                self._pipes.append(here)
                process = context.Process(
                    target=_serve,
                    args=(
                        there,
                        rank,
                        world_size,
                        backend,
                        rendezvous,
                        timeout_seconds,
                        device,
                        dict(os.environ),
                    ),
                    name=f"rank-{rank}",
                    daemon=True,
                )
                # The server takes its time, and Ctrl-C must not wait for that.
                with (
                    contextlib.nullcontext()
                    if _is_served(context)
                    else system.blocked([signal.SIGINT])
                ):
                    process.start()
                self._processes.append(process)
                there.close()
            self._collect(time.monotonic() + timeout_seconds + _START_SECONDS)
        except BaseException:
            self.close()
            raise

    @property
    def is_alive(self) -> bool:
        """True while the pool can take calls."""
        return bool(self._pipes)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(*args) on every rank at once; the results by rank.

        Raises:
            RankFailure: a rank raised (with its traceback), died, or did not answer in time.
        """
        return self.run_each(function, [args] * self.world_size)

    def run_each(
        self, function: Callable[..., Any], args_by_rank: Sequence[Sequence[Any]]
    ) -> list[Any]:
        """function(*args_by_rank[rank]) on every rank at once; the results by rank."""
        if not self.is_alive:
            raise RankFailure("the pool was ended by an earlier failure")
        try:
            for pipe, args in zip(self._pipes, args_by_rank, strict=True):
                with contextlib.suppress(
                    OSError
                ):  # a rank that died says so when it is asked for its answer
                    pipe.send_bytes(pickle.dumps((function, tuple(args))))
            return self._collect(time.monotonic() + self.timeout_seconds)
        except BaseException:
            self.close()
            raise

    def _collect(self, deadline: float) -> list[Any]:
        waiting = dict(enumerate(self._pipes))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while waiting:
            # After a first failure the others get a moment to tell theirs: they may have failed
            # first.
            left = (
                deadline - time.monotonic()
                if not failures
                else min(2.0, deadline - time.monotonic())
            )
            ready = wait(list(waiting.values()), timeout=max(0.0, left))
            if not ready:
                break
            for rank in [r for r, pipe in waiting.items() if pipe in ready]:
                try:
                    is_ok, value = pickle.loads(waiting.pop(rank).recv_bytes())  # noqa: S301 our own child
                except (EOFError, OSError):
                    self._processes[rank].join(timeout=10.0)  # its pipe ends before it does
                    is_ok, value = (
                        False,
                        f"the process died, exit code {self._processes[rank].exitcode}",
                    )
                (results if is_ok else failures)[rank] = value
        if failures or waiting:
            lines = [f"rank {rank}: {text}" for rank, text in sorted(failures.items())]
            lines += [f"rank {rank}: no answer" for rank in sorted(waiting)]
            raise RankFailure("\n".join(lines), results, failures, sorted(waiting))
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the ranks."""
        for pipe in self._pipes:
            pipe.close()
        self._pipes = []
        deadline = time.monotonic() + 2.0
        for process in self._processes:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _context(device: str) -> ForkServerContext | SpawnContext:
    """Return the way to start a rank: as a fork of a server that has imported what ranks need.

    Not on CUDA, which cannot be used in a fork if an import has asked it for its devices.
    """
    # Started with the first process otherwise, and lets the signal through that is blocked.
    if system.is_posix():
        resource_tracker.ensure_running()
    if not system.is_linux() or device != "cpu":
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    # DDP and the optimizers import torch's compiler.
    context.set_forkserver_preload([__name__, "syncnorm._public", "torch._dynamo"])
    with system.blocked([signal.SIGINT]):
        forkserver.ensure_running()
    return context


def _is_served(context: ForkServerContext | SpawnContext) -> bool:
    return context.get_start_method() == "forkserver"


def _serve(
    pipe: Connection,
    rank: int,
    world_size: int,
    backend: str,
    rendezvous: str,
    timeout_seconds: float,
    device: str,
    environment: Mapping[str, str],
) -> None:
    # As the server has it, unless that is somebody else's.
    system.block([signal.SIGINT])
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():  # ended while the server was importing
        leave(1)
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    with contextlib.suppress(EOFError, OSError):
        timeout = timedelta(seconds=timeout_seconds)
        store = dist.FileStore(rendezvous, world_size)  # pyright: ignore[reportPrivateImportUsage]
        # The timeout is for collectives: importing takes what it takes.
        store.set(f"here/{rank}", "")
        store.wait(
            [f"here/{each}" for each in range(world_size)], timedelta(seconds=_START_SECONDS)
        )
        dist.init_process_group(
            backend, store=store, timeout=timeout, rank=rank, world_size=world_size
        )
        _answer(pipe, lambda: None)
        while True:
            message = pipe.recv_bytes()
            _answer(pipe, lambda message=message: _call(message))
    leave(0)


def leave(status: int) -> NoReturn:
    """End this process at once: at an ordinary exit gloo's threads may outlive the interpreter.

    That would abort. Resources of multiprocessing are released before: torch's compiler, for one,
    leaves a semaphore.
    """
    util._run_finalizers(0)  # pyright: ignore[reportAttributeAccessIssue] undocumented, and tested
    system.flush_streams()
    os._exit(status)


def _call(message: bytes) -> Any:
    function, args = pickle.loads(message)  # noqa: S301 from our own parent
    inflight.reset_rooms()  # so that what travels does not depend on what was called before
    return function(*args)


def _answer(pipe: Connection, call: Callable[[], Any]) -> None:
    try:
        answer = pickle.dumps((True, call()))
    except Exception:
        answer = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(answer)
