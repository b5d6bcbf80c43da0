"""SyncBatchRenorm on live process groups equals the paper's algorithm on the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm import RenormSchedule, SyncBatchRenorm, prepare_ddp, reference
from syncnorm.testing import assert_close, shard
from tests.covering import covering
from tests.distributed.steps import (
    Batch,
    check_against_oracle,
    parameters,
    run_steps,
    trained_statistics,
)

SPLITS = [(6,), (4, 2), (6, 0), (3, 0, 3), (1, 1, 1), (7, 0, 1, 0)]
BOUNDS = [(1.0, 0.0), (1.2, 0.2), (50.0, 50.0), (float("inf"), float("inf"))]


@pytest.mark.parametrize(
    *covering(
        dtype=[torch.float64, torch.float32, torch.bfloat16],
        sizes=SPLITS,
        spatial=[(), (5, 4)],
        bounds=BOUNDS,
    ),
    ids=str,
)
def test_equals_the_whole_batch(pool, dtype, sizes, spatial, bounds):
    batches = [
        Batch.random((sum(sizes), 5, *spatial), dtype, masked=seed == 1, seed=seed)
        for seed in (0, 1, 2)
    ]
    # Renormalised outputs lie off zero by d, so half types round values that are larger than their
    # spread.
    factor = 2.0 if dtype == torch.bfloat16 else 1.0
    for running_average in ("std", "var"):
        options = {"bounds": bounds, "running_average": running_average, "momentum": 0.3}
        by_rank = run_steps(pool(len(sizes)), batches, sizes, options)
        check_against_oracle(by_rank, batches, sizes, options, factor)


@pytest.mark.parametrize("options", [{"affine": False}, {"momentum": None}, {"eps": 0.1}], ids=str)
def test_options(pool, options):
    batches = [Batch.random((6, 4, 3), torch.float64, seed=seed) for seed in range(3)]
    options = {"bounds": (1.3, 0.5), "running_average": "std", **options}
    check_against_oracle(
        run_steps(pool(3), batches, (3, 0, 3), options), batches, (3, 0, 3), options
    )


@pytest.mark.parametrize("bounds", BOUNDS[1:3], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("sizes", [(4, 2), (5, 0, 1)], ids=str)
def test_finite_differences_with_r_and_d_frozen(pool, sizes, bounds):
    batch = Batch.random((6, 4, 3), torch.float64, masked=True, seed=3)
    options = {"bounds": bounds, "running_average": "std"}
    outcomes = [o[0] for o in run_steps(pool(len(sizes)), [batch], sizes, options)]
    weight, bias = parameters(4, torch.float64)
    r, d = _frozen(batch, bounds)

    def objective(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = reference.batch_norm(x, mask=batch.mask) * r + d
        return ((y * weight.view(-1, 1) + bias.view(-1, 1)) * batch.cotangent).sum()

    values = [batch.x, weight, bias]
    got = [
        torch.cat([o.grad_input for o in outcomes]),
        sum(o.parameters["weight"] for o in outcomes),
        sum(o.parameters["bias"] for o in outcomes),
    ]
    for which, gradient in enumerate(got):
        expected = _central_differences(
            lambda t, which=which: objective(*_replaced(values, which, t)), values[which]
        )
        assert (gradient - expected).abs().max() < 1e-8


def _frozen(batch: Batch, bounds: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    running = trained_statistics(4)
    _, mean, var = reference.moments(batch.x, batch.mask)
    sigma = (running.var + 1e-5).sqrt()
    r = ((var + 1e-5).sqrt() / sigma).clip(1 / bounds[0], bounds[0])
    d = ((mean - running.mean) / sigma).clip(-bounds[1], bounds[1])
    return r.view(-1, 1), d.view(-1, 1)


def _replaced(values: list[torch.Tensor], which: int, value: torch.Tensor) -> list[torch.Tensor]:
    return [value if i == which else v for i, v in enumerate(values)]


def _central_differences(f, x: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        e = torch.zeros_like(x).view(-1)
        e[i] = step
        e = e.view_as(x)
        gradient.view(-1)[i] = (f(x + e) - f(x - e)) / (2 * step)
    return gradient


def _under_ddp(x: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layer = SyncBatchRenorm(3, schedule=RenormSchedule.constant(2.0, 1.0), dtype=torch.float64)
    model = DistributedDataParallel(prepare_ddp(nn.Sequential(layer)))
    for _ in range(3):
        model(x[dist.get_rank()]).square().mean().backward()
    return layer.running_mean.clone(), layer.running_var.clone()


def test_under_ddp_the_running_statistics_are_those_of_all_workers(pool):
    """Not those of rank 0, broadcast over everyone's."""
    batch = Batch.random((6, 3, 4), torch.float64)
    running = reference.RunningStatistics.initial(3)
    for _ in range(3):
        reference.batch_renorm(batch.x, running=running, r_max=2.0, d_max=1.0)
    for mean, var in pool(2).run(_under_ddp, shard(batch.x, (4, 2))):
        assert_close(mean, running.mean, torch.float64, "running_mean")
        assert_close(var, running.var, torch.float64, "running_var")
