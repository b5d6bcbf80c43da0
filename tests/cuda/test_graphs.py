"""CUDA graphs: a step that was captured does, when it is replayed, what the step itself does."""

from __future__ import annotations

import collections
import copy
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from benchmarks.gpu import timing
from syncnorm import undocumented
from syncnorm.comm import inflight
from syncnorm.module import SyncNorm
from syncnorm.testing import assert_close
from tests.cuda import scenarios

pytestmark = pytest.mark.cuda


class Uncaptured(NamedTuple):
    """A step that is made again where other devices would replay it."""

    replay: Callable[[], object]


def captured(step: Callable[[], object], device: str) -> torch.cuda.CUDAGraph | Uncaptured:
    """A graph of the step, where there are graphs."""
    if device == "cpu":
        return Uncaptured(step)
    return timing.captured(step)


class Step:
    """A forward and a backward pass of a layer on tensors that stay where they are."""

    def __init__(self, layer: SyncNorm, device: str, dtype: torch.dtype, is_masked: bool) -> None:
        self.layer = layer
        self.x = torch.zeros(4, 6, 5, 5, device=device, dtype=dtype, requires_grad=True)
        self.g = torch.zeros_like(self.x)
        self.mask = torch.ones(4, 1, 5, 5, device=device) if is_masked else None
        self.y: torch.Tensor | None = None
        self.fill(0)

    def fill(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for t in (self.x.detach(), self.g):
            t.copy_(torch.randn(t.shape, generator=generator))
        if self.mask is not None:
            self.mask.copy_(torch.rand(self.mask.shape, generator=generator))

    def __call__(self) -> None:
        self.x.grad = self.y = None  # with what autograd keeps of the stream of another call
        self.layer.zero_grad()
        self.y = self.layer(self.x, self.mask)
        self.y.backward(self.g)

    def results(self) -> dict[str, torch.Tensor]:
        parameters = {f"grad_{name}": p.grad for name, p in self.layer.named_parameters()}
        found = {"y": self.y, "grad_x": self.x.grad, **parameters, **self.layer.state_dict()}
        return {name: t.detach().cpu().clone() for name, t in found.items() if t is not None}


@pytest.mark.parametrize("world", [1, 2], ids=["alone", "two ranks"])
@pytest.mark.parametrize("is_masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["norm", "renorm", "cumulative"])
def test_a_replay_is_a_step(device, kind, dtype, is_masked, world):
    if world == 2:
        store = undocumented.fake_store()
        dist.init_process_group("fake", store=store, rank=0, world_size=2)
    try:
        options = {"momentum": None} if kind == "cumulative" else {}
        layer = scenarios.make(kind.replace("cumulative", "norm"), 6, device=device, **options)
        twin = copy.deepcopy(layer)
        replayed, eager = (Step(each, device, dtype, is_masked) for each in (layer, twin))
        graph = captured(replayed, device)
        twin.load_state_dict(layer.state_dict())
        for seed in range(1, 4):
            for each in (replayed, eager):
                each.fill(seed)
            graph.replay()
            eager()
            expected = eager.results()
            for name, value in replayed.results().items():
                assert_close(value, expected[name], torch.float32, f"{name}, replay {seed}")
    finally:
        if world == 2:
            dist.destroy_process_group()


def test_the_watch_ends_no_capture(device, only_cuda, monkeypatch):
    """Its thread looks at the event of an exchange long ago, at whatever moment."""
    monkeypatch.setattr(inflight, "_recent", collections.deque(maxlen=64))
    monkeypatch.setattr(inflight, "_watchdog", inflight.Watchdog())
    dist.init_process_group("fake", store=undocumented.fake_store(), rank=0, world_size=2)
    try:
        log = inflight.log_of(dist.group.WORLD)
        log.timeout_seconds = 0.2  # it looks every 17 milliseconds
        x = torch.ones(3, device=device)
        flight = inflight.InFlight((2, 0), log, "moments", "", 2)
        flight.began = float("inf")
        flight.finish(x)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.capture_begin()
            flight.began = 0.0
            deadline = time.monotonic() + 10.0
            while flight._done is not None and time.monotonic() < deadline:
                time.sleep(0.02)
            x.add_(1.0)
            graph.capture_end()
        x.fill_(1.0)
        graph.replay()
        assert flight._done is None
        assert x.tolist() == [2.0, 2.0, 2.0]
    finally:
        inflight._watchdog._end()
        dist.destroy_process_group()
