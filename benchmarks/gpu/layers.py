"""Microseconds of the forward and backward pass of a small layer, launches included.

Pooled layers have a second rank that is nobody: they do all of their work but the transport.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import paired
from benchmarks.gpu import part, timing
from syncnorm import prepare_ddp
from syncnorm.bench.candidates import LOCAL, MODES, Candidate

SHAPES = [(8, 64, 7, 7), (32, 256, 14, 14), (64, 128)]
ROUNDS, CALLS = 9, 100
# What compiling for one shape may take; the launches are to be counted afterwards.
COMPILE_SECONDS = 40.0

Step = Callable[[], object]


NORMS = (LOCAL, "nn.SyncBatchNorm", *MODES, "renorm, sync=batch")
# The host takes no part in a replay, so modes whose messages it handles are none for a graph; and
# compiling takes its time.
CAPTURED = (LOCAL, "sync=none", "sync=batch")


class OneStep:
    """A forward and a backward pass on tensors that stay where they are."""

    def __init__(self, name: str, x: Tensor, g: Tensor) -> None:
        torch.manual_seed(0)
        norm = Candidate(name).make(x.shape[1], x.ndim)
        self.model: Any = prepare_ddp(nn.Sequential(norm).to(x.device))
        self.x, self.g = x.detach().requires_grad_(), g

    def __call__(self) -> None:
        self.x.grad = None
        self.model.zero_grad()
        self.model(self.x).backward(self.g)


def eager(step: OneStep) -> Step:
    return step


def compiled(step: OneStep) -> Step:
    is_on_cpu = step.x.device.type == "cpu"
    step.model = torch.compile(step.model, backend="aot_eager" if is_on_cpu else "inductor")
    return step


def replayed(step: OneStep) -> Step:
    """A graph of the step."""
    if step.x.device.type == "cpu":
        return step
    graph = timing.captured(step)

    def replay(kept: OneStep = step) -> None:  # whose tensors are those of the graph
        graph.replay()

    return replay


WAYS: dict[str, tuple[Callable[[OneStep], Step], tuple[str, ...]]] = {
    "eager": (eager, NORMS),
    "graph": (replayed, CAPTURED),
    "compiled": (compiled, CAPTURED),
}


def measure(settings: part.Settings) -> None:
    """Write a row for each layer, shape and way, those that take least time first."""
    with timing.workers() as (number, backend):
        for way in WAYS:
            for shape in SHAPES[-1:] if settings.is_small else SHAPES:
                key = {"part": "layers", "way": way, "shape": shape}
                key |= {"ranks": number, "backend": backend}
                if settings.left < (COMPILE_SECONDS if way == "compiled" else 10.0):
                    settings.write(**key, layer="all", error="no time was left")
                else:
                    _measure_shape(settings, key)
        # At the end: what a profiler has looked at is slower from then on.
        for name in NORMS:
            key = {"part": "layers", "way": "eager", "shape": SHAPES[-1], "layer": name}
            settings.attempt(lambda name=name: {"launches": launches(name, settings)}, **key)


def _measure_shape(settings: part.Settings, key: dict[str, Any]) -> None:
    prepare, names = WAYS[key["way"]]
    rounds, calls = (1, 1) if settings.is_small else (ROUNDS, CALLS)
    x, g = (torch.randn(key["shape"], device=settings.device) for _ in range(2))
    # Of one function torch compiles a few versions, and runs others uncompiled.
    torch._dynamo.reset()

    def turn(step: Step) -> None:
        for _ in range(calls):
            step()
        timing.synchronize(settings.device)

    turns: dict[str, Callable[[], None]] = {}
    for name in names:
        try:
            step = prepare(OneStep(name, x, g))
            turn(step)
        except Exception as error:  # one that cannot be run so says why
            settings.write(**key, layer=name, error=part.in_one_line(error))
            if part.is_device_lost():
                raise
        else:
            turns[name] = lambda step=step: turn(step)
    if not turns:
        return
    for name, seconds in paired.rounds(turns, rounds, warm_up=1).items():
        found = timing.spread([each / calls for each in seconds])
        settings.write(**key, layer=name, calls=calls, **found)


def launches(name: str, settings: part.Settings) -> int | None:
    """The number of kernels, copies and fills of a step on the device; None on a CPU."""
    step = OneStep(name, *(torch.randn(SHAPES[-1], device=settings.device) for _ in range(2)))
    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    if settings.device != "cuda":
        activities.pop()
    with profile(activities=activities) as seen:
        step()
        timing.synchronize(settings.device)
    number = sum(event.device_type == DeviceType.CUDA for event in seen.events())
    return number if settings.device == "cuda" else None


if __name__ == "__main__":
    measure(part.from_arguments())
