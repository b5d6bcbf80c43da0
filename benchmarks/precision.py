"""Errors of the layers against float64, by type, beside those of torch's own.

    python -m benchmarks.precision

Two gloo workers with ragged shards of one batch (7 x 16 x 24 x 24, mean 1, standard deviation 2), a
training forward and backward; torch.nn.BatchNorm2d has the whole batch in one process. Printed is
the largest error of each quantity, as a share of its largest value, against `syncnorm.reference` on
the same (rounded) inputs and parameters.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncnorm import RenormSchedule, SyncBatchNorm, SyncBatchRenorm, reference
from syncnorm.testing import RankPool

SIZES = (5, 2)
CHANNELS = 16
SHAPE = (sum(SIZES), CHANNELS, 24, 24)
BOUNDS = (1.5, 0.5)
QUANTITIES = ("y", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_var")


class Case(NamedTuple):
    """The types of a training step."""

    input: torch.dtype
    layer: torch.dtype
    """The type that the layer was cast to."""
    is_autocast: bool = False


CASES = {
    "float64": Case(torch.float64, torch.float64),
    "float32": Case(torch.float32, torch.float32),
    "autocast bfloat16": Case(torch.bfloat16, torch.float32, is_autocast=True),
    "autocast float16": Case(torch.float16, torch.float32, is_autocast=True),
    ".bfloat16()": Case(torch.bfloat16, torch.bfloat16),
    ".half()": Case(torch.float16, torch.float16),
}
LAYERS = ("SyncBatchNorm", "SyncBatchRenorm")


def make(layer: str, dtype: torch.dtype) -> nn.Module:
    """The layer, or torch's ("BatchNorm2d"), with weight and bias that are none of the initial
    ones.
    """
    if layer == "SyncBatchRenorm":
        made = SyncBatchRenorm(CHANNELS, momentum=0.1, schedule=RenormSchedule.constant(*BOUNDS))
    else:
        made = {"SyncBatchNorm": SyncBatchNorm, "BatchNorm2d": nn.BatchNorm2d}[layer](CHANNELS)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        made.weight.copy_(torch.rand(CHANNELS, generator=g) + 0.5)
        made.bias.copy_(torch.randn(CHANNELS, generator=g))
    return made.to(dtype)


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and the gradient of y. The samples differ in mean, so that shards do."""
    g = torch.Generator().manual_seed(0)
    offset = torch.linspace(-1, 1, SHAPE[0], dtype=torch.float64).view(-1, 1, 1, 1)
    x = 2.0 * (torch.randn(SHAPE, generator=g, dtype=torch.float64) + offset) + 1.0
    return x.to(dtype), torch.randn(SHAPE, generator=g, dtype=torch.float64).to(dtype)


def step(layer: str, case: Case, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """A training forward and backward.

    Under autocast a convolution would hand x over in this type.
    """
    made = make(layer, case.layer)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", case.input) if case.is_autocast else contextlib.nullcontext():
        y = made(x)
    y.backward(cotangent)
    assert x.grad is not None
    values = (
        y.detach(),
        x.grad,
        made.weight.grad,
        made.bias.grad,
        made.running_mean,
        made.running_var,
    )
    return dict(zip(QUANTITIES, values, strict=True))


def step_on_shard(layer: str, case: Case) -> dict[str, Tensor]:
    """This worker's part."""
    x, cotangent = (t.split(SIZES)[dist.get_rank()] for t in batch(case.input))
    return step(layer, case, x, cotangent)


def pooled(pool: RankPool, layer: str, case: Case) -> dict[str, Tensor]:
    """The workers' parts together; gradients of weight and bias are sums over workers."""
    parts = pool.run(step_on_shard, layer, case)
    whole = {name: torch.cat([part[name] for part in parts]) for name in QUANTITIES[:2]}
    sums = {
        name: torch.stack([part[name].double() for part in parts]).sum(0)
        for name in QUANTITIES[2:4]
    }
    return whole | sums | {name: parts[0][name] for name in QUANTITIES[4:]}


def truth(layer: str, case: Case) -> dict[str, Tensor]:
    """The whole batch in float64, with parameters that are rounded to the layer's type."""
    made = make(layer, case.layer)
    weight, bias = (p.detach().double().requires_grad_() for p in (made.weight, made.bias))
    x, cotangent = (t.double() for t in batch(case.input))
    x.requires_grad_()
    running = reference.RunningStatistics.initial(CHANNELS)
    if layer == "SyncBatchRenorm":
        r_max, d_max = BOUNDS
        y = reference.batch_renorm(
            x, weight, bias, running=running, r_max=r_max, d_max=d_max, momentum=0.1
        )
    else:
        y = reference.batch_norm(x, weight, bias, running=running)
    y.backward(cotangent)
    values = (y.detach(), x.grad, weight.grad, bias.grad, running.mean, running.var)
    return dict(zip(QUANTITIES, values, strict=True))


def errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each quantity, as a share of its largest value."""
    return {
        name: float((got[name].double() - value).abs().max() / value.abs().max())
        for name, value in expected.items()
    }


def torchs(case: Case) -> dict[str, float]:
    """The errors of torch.nn.BatchNorm2d on the whole batch in one process."""
    return errors(step("BatchNorm2d", case, *batch(case.input)), truth("BatchNorm2d", case))


def main() -> None:
    print(
        f"torch {torch.__version__}; ours on {len(SIZES)} workers / torch.nn.BatchNorm2d in one "
        "process"
    )
    print(f"| layer | types | {' | '.join(QUANTITIES)} |")
    print("|---" * (2 + len(QUANTITIES)) + "|")
    with RankPool(len(SIZES)) as pool:
        for layer in LAYERS:
            for name, case in CASES.items():
                ours = errors(pooled(pool, layer, case), truth(layer, case))
                theirs = torchs(case) if layer == "SyncBatchNorm" else {}
                cells = [
                    f"{ours[q]:.0e}" + (f" / {theirs[q]:.0e}" if theirs else "") for q in QUANTITIES
                ]
                print(f"| {layer} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
