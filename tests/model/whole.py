"""A short training, once on whole batches in one process, and what frameworks make of it on ragged
shards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = (6, 3)
LR = 0.05


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6),
        nn.Linear(6, 3),
    ).double()  # fmt: skip


def batches(steps: int = 4) -> list[tuple[Tensor, Tensor]]:
    """The mean drifts along each batch, so that shards differ."""
    g = torch.Generator().manual_seed(3)
    size = sum(SIZES)
    images = torch.randn(steps, size, 1, 6, 6, generator=g, dtype=torch.float64)
    images += torch.linspace(-1, 1, size, dtype=torch.float64).view(-1, 1, 1, 1)
    return list(zip(images, torch.randint(0, 3, (steps, size), generator=g), strict=True))


def shards(rank: int) -> list[tuple[Tensor, Tensor]]:
    return [(x.split(SIZES)[rank], y.split(SIZES)[rank]) for x, y in batches()]


def train_alone(model: nn.Module) -> dict[str, Tensor]:
    """torch's own training on the whole batches; the state at its end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    for x, y in batches():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.state_dict()


def largest_difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative to each tensor's largest value; the names must be the same."""
    assert got.keys() == expected.keys()
    return max(
        float((got[key] - value).abs().max() / value.abs().max().clamp(min=1e-3))
        for key, value in expected.items()
    )


@contextmanager
def as_torchruns_worker() -> Iterator[None]:
    """Have Accelerate find this rank as a worker of torchrun, and no state of another test's."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    # The process group is there already, so nobody connects to the port.
    there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
             "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # fmt: skip
    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    try:
        with mock.patch.dict(os.environ, there):
            yield
    finally:
        for state in states:
            state._reset_state()
