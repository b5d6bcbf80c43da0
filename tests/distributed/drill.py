"""A small job whose workers go wrong, each in a fresh process; the survivors' errors and times.

The processes come from a fork server that has imported torch already: a killed rank ends a kept
pool, and starting from nothing takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from syncnorm import SyncBatchNorm, debug, prepare_ddp
from syncnorm.errors import ExchangeError

WORLD = 3
_START_SECONDS = 600.0


@dataclass
class Job:
    """A fault: its kind, its place, and the ranks that notice it."""

    fault: str
    faulty: int
    in_debug: bool
    timeout_seconds: float
    folder: Path
    """The files of each rank's standard error."""
    store_on_rank_zero: bool = False


@dataclass
class Report:
    """The end of a worker."""

    text: str
    is_promised: bool
    seconds: float
    """Since the faulty step began."""
    again: str = ""
    """The error of this worker's next exchange."""


class Skipping(nn.Module):
    """Two layers, the second of which can be skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.first = SyncBatchNorm(4)
        self.last = SyncBatchNorm(4)
        self.skips = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return x if self.skips else self.last(x)


def errors_of(job: Job, rank: int) -> Path:
    return job.folder / f"errors-{rank}"


def run(job: Job) -> dict[int, Report]:
    """The reports of the ranks that lived to make one.

    Raises:
        AssertionError: a rank neither reported nor died in time.
    """
    context = multiprocessing.get_context("forkserver")  # the one of tests/launch/forked.py
    store = None
    if not job.store_on_rank_zero:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, other = context.Pipe()
    pipes: list[Connection] = []
    processes = []
    for rank in range(WORLD):
        here, there = context.Pipe()
        port = store.port if store is not None else None
        process = context.Process(
            target=_worker, args=(there, rank, port, job, first if rank == 0 else None)
        )
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    if port is None:
        assert other.poll(_START_SECONDS)
        port = other.recv()
    try:
        for pipe in pipes:
            pipe.send(port)
        return _collect(pipes, job)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], job: Job) -> dict[int, Report]:
    reports: dict[int, Report] = {}
    waiting = dict(enumerate(pipes))
    deadline = time.monotonic() + _START_SECONDS + 4 * job.timeout_seconds
    while waiting:
        ready = wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"no report of ranks {sorted(waiting)} for {job}; of the others: {reports}"
        for rank in [r for r, pipe in waiting.items() if pipe in ready]:
            try:
                reports[rank] = waiting.pop(rank).recv()
            except EOFError:
                continue
    return reports


def _worker(
    pipe: Connection, rank: int, port: int | None, job: Job, tell_port: Connection | None
) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(errors_of(job, rank), os.O_WRONLY | os.O_CREAT), 2)
    if tell_port is not None and job.store_on_rank_zero:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        tell_port.send(store.port)
        pipe.recv()
    else:
        store = dist.TCPStore("127.0.0.1", pipe.recv(), is_master=False)
    timeout = timedelta(seconds=job.timeout_seconds if not job.in_debug else 60.0)
    dist.init_process_group("gloo", store=store, timeout=timeout, rank=rank, world_size=WORLD)
    model = prepare_ddp(Skipping())
    with debug(job.in_debug, timeout_seconds=job.timeout_seconds if job.in_debug else None):
        _step(model, 4)
        dist.barrier()
        pipe.send(_report(model, rank, job))
    # Stays for the others as long as it takes them to notice by themselves: its end would tell
    # them.
    if not job.store_on_rank_zero:
        pipe.poll(2 * job.timeout_seconds)
    os._exit(0)


def _report(model: Skipping, rank: int, job: Job) -> Report:
    channels = 4
    start = time.monotonic()
    if rank == job.faulty:
        if job.fault == "skips":
            model.skips = True
        elif job.fault in ("raises", "skips all"):
            return Report("elsewhere", False, 0.0)
        elif job.fault == "is killed":
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif job.fault == "sends another C":
            model.last = SyncBatchNorm(2)
            model.last.label = "last"
        elif job.fault == "is late":
            time.sleep(job.timeout_seconds + 1.0)
            start = time.monotonic() - job.timeout_seconds
    elif rank == WORLD - 1 and job.fault == "is killed":
        # So that the killed one is inside the exchange, waiting, when it dies.
        time.sleep(1.5)
    text, is_promised = _text(model, channels)
    seconds = time.monotonic() - start
    return Report(text, is_promised, seconds, _text(model, channels)[0] if job.in_debug else "")


def _text(model: Skipping, channels: int) -> tuple[str, bool]:
    try:
        _step(model, channels)
    except ExchangeError as error:
        return str(error), True
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}", False
    return "no error", False


def _step(model: Skipping, channels: int) -> None:
    x = torch.randn(5, channels, requires_grad=True)
    y = model.first(x)
    if not model.skips:
        y = model.last(y[:, : model.last.num_features])
    y.square().mean().backward()
