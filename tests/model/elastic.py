"""A loop of one's own over an ElasticBatchSampler, on each rank of a pool."""

from __future__ import annotations

import itertools
import multiprocessing
from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from syncnorm import ElasticBatchSampler, convert, prepare_ddp
from syncnorm.placement import epoch_order

SIZE, GLOBAL_BATCH = 50, 12
"""The last step of an epoch has 2 samples: fewer than four workers."""


class Trained(NamedTuple):
    losses: list[float]
    """Of the steps, on all workers together."""
    state: dict[str, Tensor]
    """Of the model."""
    optimizer: dict[str, Any]
    sampler: dict[str, Any]
    drawn: list[int]
    """This worker's samples in each batch, stand-ins left out."""


def dataset() -> TensorDataset:
    """Samples whose mean drifts, so that shards differ."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(SIZE, 1, 6, 6, generator=g, dtype=torch.float64)
    x += torch.linspace(-1, 1, SIZE, dtype=torch.float64).view(-1, 1, 1, 1)
    return TensorDataset(x, torch.randint(0, 3, (SIZE,), generator=g))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 3),
    ).double()  # fmt: skip


def train(
    options: dict[str, Any], steps: int, start: Trained | None = None, loader_workers: int = 0, sync: str = "batch"
) -> Trained:  # fmt: skip
    sampler = ElasticBatchSampler(SIZE, GLOBAL_BATCH, **options)
    model = prepare_ddp(convert(net(), sync=sync))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    if start is not None:
        model.load_state_dict(start.state)
        optimizer.load_state_dict(start.optimizer)
        sampler.load_state_dict(start.sampler)
    ddp = DistributedDataParallel(sampler.attach(model))
    loader = DataLoader(
        dataset(),
        batch_sampler=sampler,
        num_workers=loader_workers,
        # Not by the server that the ranks come from, whose forks would import torch.
        multiprocessing_context="fork" if loader_workers else None,
        persistent_workers=loader_workers > 0,
    )
    losses, drawn = [torch.zeros((), dtype=torch.float64)], []
    # The ranks of a pool are daemons, which may have no children.
    with mock.patch.dict(multiprocessing.current_process()._config, daemon=False):
        while len(losses) <= steps:
            for x, y in loader:
                drawn.append(sampler.count)
                with nullcontext() if sampler.ends_step else ddp.no_sync():
                    loss = sampler.scale_loss(F.cross_entropy(ddp(x), y))
                    loss.backward()
                losses[-1] += loss.detach()
                is_step = sampler.ends_step
                if is_step:
                    optimizer.step()
                    optimizer.zero_grad()
                sampler.advance()
                if is_step:
                    losses.append(torch.zeros((), dtype=torch.float64))
                    if len(losses) > steps:
                        break
    curve = torch.stack(losses[:steps])
    dist.all_reduce(curve)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return Trained(
        (curve / dist.get_world_size()).tolist(),
        state,
        optimizer.state_dict(),
        sampler.state_dict(),
        drawn,
    )


def train_alone(steps: int) -> Trained:
    """torch's own layers on whole batches, without a sampler."""
    model, samples, losses = net(), dataset(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    epochs = (epoch_order(SIZE, 0, epoch).split(GLOBAL_BATCH) for epoch in itertools.count(1))
    for indices in itertools.islice(itertools.chain.from_iterable(epochs), steps):
        x, y = samples[indices]
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Trained(losses, model.state_dict(), optimizer.state_dict(), {}, [])


def gap(one: Trained, other: Trained) -> float:
    """The largest relative difference of losses, parameters and buffers."""
    pairs = [(torch.tensor(one.losses), torch.tensor(other.losses))]
    pairs += [(one.state[key], value) for key, value in other.state.items()]
    assert one.state.keys() == other.state.keys()
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pairs)
