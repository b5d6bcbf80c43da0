"""Clocks and groups of processes for what is measured; nothing that a test's outcome needs."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm import undocumented

# What is left of a cache of any size after this much was written.
FLUSHED_BYTES = 2**29
# Longer than a host takes to enqueue a few dozen launches.
FLUSH_SECONDS = 1.5e-3
# A device that was idle takes so long to come to its clock.
WAKING_SECONDS = 0.5


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles, and of how many."""
    low, _, high = (
        statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    )
    return {
        "median": statistics.median(seconds),
        "low": low,
        "high": high,
        "repetitions": len(seconds),
    }


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Warm up and capture a step, as torch's documents say."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Times of single calls on the device, each from an empty cache."""

    def __init__(self, device: str) -> None:
        self.device = device
        size = FLUSHED_BYTES if device == "cuda" else 1
        self._flushed = torch.empty(size, dtype=torch.uint8, device=device)
        self._times = 1 if device != "cuda" else math.ceil(FLUSH_SECONDS / self._flush_seconds())

    def seconds(
        self, function: Callable[[], object], count: int, warm_up: int = 3, writes: bool = True
    ) -> list[float]:
        """The device's seconds of `count` calls.

        They are enqueued while the cache is being flushed, which takes longer than that, so that
        the host's part is not in them. A call that writes as much as the cache holds leaves that
        much of its writing to whoever comes next, so it finds as much; one that writes next to
        nothing (`writes=False`) finds nothing that is to be written.
        """
        for _ in range(warm_up):
            function()
        if self.device != "cuda":
            return [self._host_seconds(function) for _ in range(count)]
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            for _ in range(self._times):
                self._flushed.zero_()
            if not writes:
                self._flushed.view(torch.int64).amax()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [1e-3 * start.elapsed_time(end) for start, end in events]

    def _flush_seconds(self) -> float:
        """The least seconds of a flush, on a device that has been busy: an idle one is slow."""
        until = time.monotonic() + WAKING_SECONDS
        while time.monotonic() < until:
            self._flushed.zero_()
            torch.cuda.synchronize()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
        for event in events:  # the first has the way to the device before it
            self._flushed.zero_()
            event.record()
        torch.cuda.synchronize()
        return 1e-3 * min(a.elapsed_time(b) for a, b in itertools.pairwise(events))

    @staticmethod
    def _host_seconds(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start


@contextmanager
def workers() -> Iterator[tuple[int, str]]:
    """The number of ranks and the backend: of the default group, else of one with a stand-in.

    There the second rank is nobody: messages are made, and go nowhere. So layers that pool do all
    of their work but the transport.
    """
    if dist.is_initialized():
        yield dist.get_world_size(), dist.get_backend()
        return
    dist.init_process_group("fake", store=undocumented.fake_store(), rank=0, world_size=2)
    try:
        with mock.patch.object(dist, "all_gather_into_tensor", _gather_from_nobody):
            yield 2, "fake"
    finally:
        dist.destroy_process_group()


def _gather_from_nobody(to: Tensor, own: Tensor, *args: Any, **options: Any) -> None:
    """Give the second rank the message of the first.

    The stand-in's own gathering does not take the shapes of `torch.nn.SyncBatchNorm`.
    """
    to.view(2, -1).copy_(own.view(1, -1))
