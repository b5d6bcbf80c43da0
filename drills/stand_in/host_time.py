"""The host's time for a layer on CUDA, as a multiple of a local one's: Python, torch and Triton.

    nox --session stand_in -- --host-time

The libraries of the stand-in take each kernel and do nothing, so all of the time is the host's; what
a driver takes for a launch is missing. A chain of layers, as the way to autograd's thread and back is
made once for a model. Of torch.nn.SyncBatchNorm it is the course that it takes while a graph is
captured; by itself it also looks for empty shards, and waits for the device.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.gpu import timing
from syncnorm.bench.candidates import LOCAL, Candidate
from syncnorm.maths.kernels import triton

LAYERS, ROUNDS, WARM_UP = 20, 200, 5
NORMS = (LOCAL, "nn.SyncBatchNorm", "sync=none", "sync=batch", "renorm, sync=batch")
SHAPE = (32, 64, 56, 56)


def _step(model: nn.Module, x: Tensor, g: Tensor) -> tuple[float, float]:
    """Seconds of all layers, forward and backward."""
    x.grad = None
    start = time.perf_counter()
    y = model(x)
    middle = time.perf_counter()
    y.backward(g)
    end = time.perf_counter()
    return middle - start, end - middle


def main() -> None:
    warnings.simplefilter("ignore")
    torch.backends.cudnn.enabled = False
    device = torch.device("cuda", 0)
    # Nothing runs, so that a first try would find a wrong result.
    triton._usable[device] = True
    x, g = (torch.empty(SHAPE, device=device, dtype=torch.bfloat16) for _ in range(2))
    x, g = (t.to(memory_format=torch.channels_last) for t in (x, g))
    print("| layer | forward | backward |\n|---|---|---|")
    captures = mock.patch("torch.cuda.is_current_stream_capturing", return_value=True)
    with timing.workers():
        steps = {}
        for name in NORMS:
            model = nn.Sequential(*(Candidate(name).make(SHAPE[1]) for _ in range(LAYERS)))
            steps[name] = partial(_step, model.to(device), x.detach().requires_grad_(), g)
        found = {name: [] for name in steps}
        for _ in range(WARM_UP + ROUNDS):
            for name, step in steps.items():
                with captures if name == "nn.SyncBatchNorm" else contextlib.nullcontext():
                    found[name].append(step())
    for name, each in found.items():
        ratios = [
            [ours / local for ours, local in zip(*both, strict=True)]
            for both in zip(each[WARM_UP:], found[LOCAL][WARM_UP:], strict=True)
        ]
        forward, backward = (statistics.median(part) for part in zip(*ratios, strict=True))
        print(f"| {name} | {forward:.1f} | {backward:.1f} |")


if __name__ == "__main__":
    main()
