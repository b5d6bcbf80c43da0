"""The kernels of a layer against the bandwidth of a copy, and against torch's own.

For each distinct shape of ResNet-50's batch norms at batch 256. A primitive's share is

    (bytes that it has to read and write / its time) / (bytes that a copy of x does / its time)
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import part, timing
from syncnorm.maths.moments import Raw

BATCH = 256
# (C, H, W), and how many of the 53 batch norms have it.
SHAPES = {
    (64, 112, 112): 1,
    (256, 56, 56): 4,
    (128, 56, 56): 1,
    (512, 28, 28): 5,
    (64, 56, 56): 6,
    (256, 28, 28): 1,
    (1024, 14, 14): 7,
    (128, 28, 28): 7,
    (512, 14, 14): 1,
    (2048, 7, 7): 4,
    (256, 14, 14): 11,
    (512, 7, 7): 5,
}
SMALL_SHAPES = {(3, 4, 5): 1}
# The least that each has to read and write, in units of x's bytes.
TRAFFIC = {"moments": 1, "normalize": 2, "backward_sums": 2, "backward_input": 3}
READ_ONLY = {"moments", "backward_sums"}
COPY_TRAFFIC = 2
EPS = 1e-5

Primitives = dict[str, Callable[[], object]]


def ours(x: Tensor, g: Tensor, weight: Tensor, bias: Tensor, module: str = "triton") -> Primitives:
    """The kernels in Triton, or "composed" of operators, which other devices have."""
    kernels = importlib.import_module(f"syncnorm.maths.kernels.{module}")
    sums = kernels.moments(x, None)
    batch, n, types = Raw(sums), sums[-1], (weight.dtype, bias.dtype)
    _, rows = kernels.normalize(x, batch, weight, bias, EPS, None)
    totals, *_ = kernels.backward_sums(g, x, rows, *types)
    return {
        "moments": lambda: kernels.moments(x, None),
        "normalize": lambda: kernels.normalize(x, batch, weight, bias, EPS, None),
        "backward_sums": lambda: kernels.backward_sums(g, x, rows, *types),
        "backward_input": lambda: kernels.backward_input(g, x, rows, weight, totals, n, None),
    }


def torchs(x: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Primitives:
    """The operators that `torch.nn.SyncBatchNorm` is made of."""
    mean, invstd = torch.batch_norm_stats(x, EPS)
    wanted = True, True, True
    sum_g, products, *_ = torch.batch_norm_backward_reduce(g, x, mean, invstd, weight, *wanted)
    count = torch.full((1,), x.numel() // x.shape[1], dtype=torch.int32, device=x.device)
    sums = weight, sum_g, products, count
    return {
        "moments": lambda: torch.batch_norm_stats(x, EPS),
        "normalize": lambda: torch.batch_norm_elemt(x, weight, bias, mean, invstd, EPS),
        "backward_sums": lambda: torch.batch_norm_backward_reduce(
            g, x, mean, invstd, weight, *wanted
        ),
        "backward_input": lambda: torch.batch_norm_backward_elemt(g, x, mean, invstd, *sums),
    }


# With the repetitions of each.
KERNELS = {
    "ours": (ours, 20),
    "torch's": (torchs, 20),
    "ours, portable": (functools.partial(ours, module="composed"), 5),
}


def measure(settings: part.Settings) -> None:
    """Write a row for each primitive of each kind of kernels, the largest shapes first."""
    clock = timing.Clock(settings.device)
    for dtype in (torch.bfloat16, torch.float32):
        for layout in ("channels last", "contiguous"):
            for shape, layers in (SMALL_SHAPES if settings.is_small else SHAPES).items():
                case = {"dtype": str(dtype).removeprefix("torch."), "layout": layout}
                key = {"part": "primitives", **case, "shape": shape, "layers": layers}
                if settings.left < 5.0:
                    settings.write(**key, error="no time was left")
                    continue
                _measure_shape(settings, clock, key, dtype)


def _measure_shape(
    settings: part.Settings, clock: timing.Clock, key: dict[str, Any], dtype: torch.dtype
) -> None:
    batch = 2 if settings.is_small else BATCH
    where: dict[str, Any] = {"device": settings.device, "dtype": dtype}
    form = torch.contiguous_format if key["layout"] == "contiguous" else torch.channels_last
    x, g = (
        torch.randn(batch, *key["shape"], **where).contiguous(memory_format=form) for _ in range(2)
    )
    channels = x.shape[1]
    weight, bias = (torch.rand(channels, device=settings.device) for _ in range(2))
    copy = timing.spread(clock.seconds(lambda: g.copy_(x), 20))
    bandwidth = COPY_TRAFFIC * x.nbytes / copy["median"]
    settings.write(**key, kernels="copy", bytes=x.nbytes, bandwidth=bandwidth, **copy)

    def timed(function: Callable[[], object], primitive: str, count: int) -> dict[str, Any]:
        found = timing.spread(clock.seconds(function, count, writes=primitive not in READ_ONLY))
        share = TRAFFIC[primitive] * x.nbytes / found["median"] / bandwidth
        return {"share": share, "bytes": x.nbytes, **found}

    for name, (make, count) in KERNELS.items():
        try:
            primitives = make(x, g, weight, bias)
        except Exception as error:  # such as no Triton: the others can be timed
            settings.write(**key, kernels=name, error=part.in_one_line(error))
            if part.is_device_lost():
                raise
            continue
        for primitive, function in primitives.items():
            row = {**key, "kernels": name, "primitive": primitive}
            settings.attempt(lambda f=function, p=primitive, n=count: timed(f, p, n), **row)


if __name__ == "__main__":
    measure(part.from_arguments())
