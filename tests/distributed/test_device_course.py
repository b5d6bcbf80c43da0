"""The layers on the course of a GPU's tensors: no value read, (C,)-sized work in the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm import (
    RenormSchedule,
    SyncBatchNorm,
    SyncBatchRenorm,
    accumulate,
    functional,
    monitor,
    prepare_ddp,
)
from syncnorm.errors import InputError
from syncnorm.testing import assert_close
from tests.as_device import as_device, call_as_device
from tests.covering import covering
from tests.distributed.steps import Batch, check_against_oracle, train_step
from tests.model.parts import Checkpointed

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"affine": False, "momentum": None},
    {"bounds": (1.25, 0.25), "momentum": 0.3},
    {"bounds": (1.25, 0.25), "running_average": "var", "affine": False},
    {"bounds": (50.0, 50.0), "momentum": None},
]


@pytest.mark.parametrize(
    *covering(
        dtype=DTYPES,
        masked=[False, True],
        sizes=[(6,), (4, 2), (3, 0, 3), (1, 1, 1)],
        options=OPTIONS,
    ),
    ids=str,
)
def test_equals_the_oracle(pool, dtype, masked, sizes, options):
    _check_against_oracle(pool, "composed", dtype, masked, sizes, options)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2]], ids=str)
@pytest.mark.parametrize("sizes", [(4, 2), (3, 0, 3), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_oracle_in_triton(pool, dtype, sizes, options):
    pytest.importorskip("triton")
    _check_against_oracle(pool, "triton", dtype, True, sizes, options)


def _check_against_oracle(
    pool: Any,
    kernels: str,
    dtype: torch.dtype,
    masked: bool,
    sizes: tuple[int, ...],
    options: dict[str, Any],
) -> None:
    batches = [
        Batch.random((sum(sizes), 5, *spatial), dtype, masked=masked and seed > 0, seed=seed)
        for seed, spatial in enumerate([(), (4, 3), ()])
    ]
    by_rank = zip(*(batch.shards(sizes) for batch in batches), strict=True)
    got = pool(len(sizes)).run_each(
        call_as_device, [(kernels, train_step, list(steps), options) for steps in by_rank]
    )
    check_against_oracle(got, batches, sizes, options, factor=2.0)


def _course(sync: str, is_renorm: bool, way: str) -> list[Tensor]:
    """Three training steps of a small model: its outputs, gradients and buffers."""
    torch.manual_seed(dist.get_rank())
    schedule = RenormSchedule(2.0, 1.0, 1, 3, 2)
    layers = [
        SyncBatchRenorm(4, schedule=schedule, sync=sync, dtype=torch.float64)
        if is_renorm
        else SyncBatchNorm(4, sync=sync, dtype=torch.float64)
        for _ in range(2)
    ]
    body = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    model = prepare_ddp(Checkpointed(body) if way == "checkpointed" else body)
    ddp = DistributedDataParallel(model)
    seen = []
    for step in range(3):
        torch.manual_seed(100 * step + dist.get_rank())
        parts = [torch.randn(4, 4, 3).double().mul(2).add(step).requires_grad_() for _ in range(2)]
        if way == "accumulated":
            with accumulate(model):
                ys = [ddp(x) for x in parts]
                sum(y.square().sum() for y in ys).backward()
        else:
            ys = [ddp(x) for x in parts[:1]]
            if way == "differentiated":
                (gradient,) = torch.autograd.grad(ys[0].pow(3).sum(), parts[0], create_graph=True)
                (gradient.square().sum() + ys[0].sum()).backward()
            else:
                ys[0].pow(3).sum().backward()
        seen += [y.detach() for y in ys] + [x.grad for x in parts[: len(ys)]]
        seen += [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
    figures = monitor(model).read()["layers"]
    figures = [v for f in figures.values() for v in f.values() if v is not None]
    seen.append(torch.tensor(figures, dtype=torch.float64))
    return [*seen, *(b.double() for b in model.state_dict().values())]


@pytest.mark.parametrize("is_renorm", [False, True], ids=["norm", "renorm"])
@pytest.mark.parametrize("sync", ["batch", "running", "lagged", "none"])
@pytest.mark.parametrize(
    ("way", "kernels"),
    [
        ("plain", "composed"),
        ("accumulated", "composed"),
        ("checkpointed", "composed"),
        ("differentiated", "composed"),
        ("checkpointed", "triton"),
    ],
)
def test_equals_the_course_of_the_cpu(pool, sync, is_renorm, way, kernels):
    if kernels == "triton":
        pytest.importorskip("triton")
    if sync == "lagged" and way == "differentiated":  # refused by name
        pytest.skip("a lagged gradient is not differentiated")
    expected = pool(2).run(_course, sync, is_renorm, way)
    got = pool(2).run(call_as_device, kernels, _course, sync, is_renorm, way)
    # Neither is the truth, and a second derivative is a sum that all but cancels.
    factor = 2.0 if way == "differentiated" else 1.0
    for ours, theirs in zip(got, expected, strict=True):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_close(a, b, b.dtype, f"tensor {i}", factor)


class _Masked(nn.Module):
    """Three layers, the first of which is given a mask."""

    def __init__(self, sync: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SyncBatchNorm(3, sync=sync) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        first, second, third = self.layers
        return third(second(first(x, mask)))


def _after_a_fault(sync: str) -> list[bool]:
    """Each buffer of a model's layers: unchanged by a step in which one rank's mask has a fault?"""
    model = prepare_ddp(_Masked(sync))
    mask = torch.ones(4, 1)
    for _ in range(2):
        model(torch.randn(4, 3), mask).sum().backward()
    model.eval().train()
    before = [b.clone() for b in model.buffers()]
    mask[1] = -1.0 if dist.get_rank() else 1.0
    model(torch.randn(4, 3), mask).sum().backward()
    model.eval()
    return [b.equal(was) for b, was in zip(model.buffers(), before, strict=True)]


@pytest.mark.parametrize("kernels", ["composed", "triton"])
def test_a_fault_leaves_the_statistics_of_all_layers(pool, kernels):
    if kernels == "triton":
        pytest.importorskip("triton")
    for unchanged in pool(2).run(call_as_device, kernels, _after_a_fault, "running"):
        assert all(unchanged)


def test_tensors_of_another_device_are_refused():
    with as_device(), pytest.raises(InputError, match="`weight` must be on the device of x, cpu"):
        SyncBatchNorm(3, device="meta", track_running_stats=False)(torch.randn(4, 3))
    statistics = torch.zeros(3), torch.ones(3)
    counter = torch.zeros((), dtype=torch.int64, device="meta")
    with as_device(), pytest.raises(InputError, match="`num_batches_tracked` must be on the dev"):
        functional.sync_batch_norm(torch.randn(4, 3), *statistics, num_batches_tracked=counter)


def test_weights_that_are_none_make_nan_and_leave_the_buffers():
    layer = SyncBatchNorm(3)
    before = {name: b.clone() for name, b in layer.named_buffers()}
    mask = torch.ones(4, 1)
    mask[1] = -1.0
    with as_device():
        assert layer(torch.randn(4, 3), mask).isnan().all()
    assert all(b.equal(before[name]) for name, b in layer.named_buffers())
