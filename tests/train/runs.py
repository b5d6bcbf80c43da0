"""Functions that a pool's ranks call: they must be importable."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from syncnorm import SyncBatchNorm, prepare_ddp
from syncnorm.train.config_file import load_config
from syncnorm.train.data import Split, shard
from syncnorm.train.loop import Outcome, Position, train
from syncnorm.train.statistics import gather_digests
from syncnorm.train.step import evaluate, training_step
from syncnorm.train.workers import Workers


def workers() -> Workers:
    return Workers(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def train_digits(folder: str, overrides: list[str]) -> tuple[Outcome, Position]:
    """Train as configs/digits.yaml says, but for `overrides`, on the ranks of the pool."""
    position = Position()
    return train(load_config("digits", overrides), workers(), Path(folder), position), position


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Read the run's metrics of one kind."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


class Sign(nn.Module):
    """Says class 1 for positive numbers, class 0 for others; fails if it is asked in training mode."""

    def forward(self, x):
        assert not self.training
        positive = (x.flatten(1).sum(1) > 0).long()
        return nn.functional.one_hot(positive, 2).double()


def evaluate_sign(numbers: list[float], labels: list[int], chunk: int) -> tuple[float, bool]:
    """Evaluate `Sign` on this rank's shard of `numbers`."""
    mine = shard(len(numbers), dist.get_rank(), dist.get_world_size())
    split = Split(torch.tensor(numbers).reshape(-1, 1, 1, 1), torch.tensor(labels))
    model = Sign().train()
    return evaluate(model, split[mine], chunk), model.training


def one_step(count: int) -> tuple[float, list[torch.Tensor]]:
    """Take one step on `count` samples over all ranks; return the summed loss and the new parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), SyncBatchNorm(3), nn.Flatten(), nn.Linear(108, 4)).double()
    model = nn.parallel.DistributedDataParallel(prepare_ddp(model))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    batch = Split(images, torch.arange(count) % 4)
    mine = batch[shard(count, dist.get_rank(), dist.get_world_size())]
    loss = training_step(model, torch.optim.SGD(model.parameters(), lr=0.1), mine)
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size(), [parameter.detach() for parameter in model.parameters()]


def digests_of(shift_by_rank: bool) -> list[str]:
    """Gather the digests of a layer whose running mean is the rank, or the same on all."""
    layer = nn.BatchNorm1d(3)
    assert layer.running_mean is not None
    layer.running_mean += dist.get_rank() if shift_by_rank else 1
    return gather_digests(layer)
