"""A whole training step does not wait for the device, but where the documents say so."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm import prepare_ddp, scale_loss, undocumented
from tests.cuda import scenarios

pytestmark = pytest.mark.cuda

STEPS = 3


@pytest.fixture(params=[1, 2], ids=["alone", "two ranks"])
def world(request) -> Iterator[int]:
    """The number of ranks; the second is nobody: messages are made and go nowhere."""
    if request.param == 2:
        store = undocumented.fake_store()
        dist.init_process_group("fake", store=store, rank=0, world_size=2)
    yield request.param
    if request.param == 2:
        dist.destroy_process_group()


class Masked(nn.Module):
    """Two layers of one mode between convolutions, the first with a mask."""

    def __init__(self, kind: str, **options) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), scenarios.make(kind, 8, **options)
        self.last, self.last_norm = nn.Conv2d(8, 4, 3), scenarios.make(kind, 4, **options)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.last_norm(self.last(self.norm(self.conv(x), mask).relu())).mean((2, 3))


# DistributedDataParallel arranges its buckets, and looks at its own timers, in the first ones.
WARM_UP = 12


def steps_of(device: str, kind: str, is_wrapped: bool = False, **options) -> Callable[[], None]:
    """A step of training, warmed up."""
    model = prepare_ddp(Masked(kind, **options).to(device))
    if is_wrapped:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(4, 3, 9, 9, device=device)
    mask = torch.ones(4, 1, 7, 7, device=device)
    target = torch.zeros(4, dtype=torch.long, device=device)

    def step() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x, mask), target)
        scale_loss(loss, len(x)).backward()
        optimizer.step()

    for _ in range(WARM_UP if is_wrapped else 3):
        step()
    return step


@contextlib.contextmanager
def watching(device: str, how: str) -> Iterator[list[warnings.WarningMessage]]:
    """Have CUDA raise an error, or warn, when the host waits for it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(how)
        try:
            yield said
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["norm", "renorm"])
@pytest.mark.parametrize("sync", ["batch", "none", "running"])
def test_a_step_does_not_wait(device, world, sync, kind):
    step = steps_of(device, kind, sync=sync)
    with watching(device, "error"):
        for _ in range(STEPS):
            step()


def test_nor_with_a_cumulative_average(device, world):
    step = steps_of(device, "norm", momentum=None)
    with watching(device, "error"):
        step()


def test_nor_for_a_count_on_the_device(device, world):
    mean = torch.tensor(3.0, device=device, requires_grad=True)
    valid = torch.arange(5, device=device) > 1
    with watching(device, "error"):
        loss = scale_loss(mean, valid.sum())
        loss.backward()
    # Nobody adds to the count of this rank, by whose share of it the loss is weighted.
    assert loss.item() == pytest.approx(3.0 * world, rel=1e-6)


@pytest.mark.parametrize("kind", ["norm", "renorm"])
def test_lagged_waits_once_a_step(device, world, kind):
    assert waits(device, "lagged", kind) <= STEPS


def waits(device: str, sync: str, kind: str = "norm", is_wrapped: bool = False) -> int:
    """The number of times that the host waits in some steps."""
    step = steps_of(device, kind, is_wrapped, sync=sync)
    with watching(device, "warn") as said:
        for _ in range(STEPS):
            step()
    return sum("called a synchronizing" in str(each.message) for each in said)


@pytest.mark.parametrize("sync", ["batch", "none", "running", "lagged"])
def test_over_nccl(ranks, device, sync):
    allowed = STEPS if sync == "lagged" else 0
    assert max(ranks(2, "nccl").run(waits, device, sync, "norm", True)) <= allowed


def test_a_read_is_seen(device, only_cuda):
    """The negative control."""
    with watching(device, "error"), pytest.raises(RuntimeError, match="called a synchronizing"):
        torch.ones(1, device=device).item()
