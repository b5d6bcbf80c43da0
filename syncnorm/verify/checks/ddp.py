"""Under DistributedDataParallel."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm.errors import UnevenShardsWarning
from syncnorm.model.ddp import prepare_ddp
from syncnorm.module import SyncNorm
from syncnorm.verify.check import check
from syncnorm.verify.compare import expect_close
from syncnorm.verify.context import Context
from syncnorm.verify.oracle import Oracle, random_batch
from syncnorm.verify.steps import make_layer, ragged

_RATE = 0.1


@check("ddp", "three steps of SGD on equal shards are those of one process on the whole batch")
def ddp(context: Context) -> None:
    _train(context, [3] * context.world_size)


@check("ddp-ragged", "also on shards of different sizes, each loss weighted by its share")
def ddp_ragged(context: Context) -> None:
    _train(context, ragged(context.world_size))


@check("ddp-empty", "also where a worker has no samples", workers=2)
def ddp_empty(context: Context) -> None:
    _train(context, [0, *ragged(context.world_size - 1)])


def _train(context: Context, sizes: Sequence[int]) -> None:
    model = nn.Sequential(*_linears(context), nn.ReLU())
    model.insert(1, make_layer(context, 4))
    if isinstance(model[1], SyncNorm):
        prepare_ddp(model)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=_RATE)
    # DDP averages over workers: this makes it the mean over all samples.
    share = sizes[context.rank] * context.world_size / sum(sizes)
    for step in range(3):
        batch = random_batch(sum(sizes), (3,), seed=step)
        x, target = (
            t.split(list(sizes))[context.rank].to(context.device)
            for t in (batch.x, batch.cotangent)
        )
        optimizer.zero_grad()
        y = wrapped(x)
        loss = (y - target[:, :2]).square().mean() if len(x) else y.sum()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnevenShardsWarning)  # weighted by hand
            (loss * share).backward()
        optimizer.step()
    for name, expected in _truth(context, sizes).items():
        got = dict(model.named_parameters())[name].detach().cpu()
        expect_close(
            f"{name} of rank {context.rank} after three steps",
            got,
            expected,
            torch.float64,
            factor=10.0,
        )


def _linears(context: Context) -> tuple[nn.Module, nn.Module]:
    """Two linear layers that are the same wherever they are made."""
    g = torch.Generator().manual_seed(7)
    layers = nn.Linear(3, 4), nn.Linear(4, 2)
    with torch.no_grad():
        for p in (p for layer in layers for p in layer.parameters()):
            p.copy_(torch.randn(p.shape, generator=g) * 0.5)
    one, other = (layer.double().to(context.device) for layer in layers)
    return one, other


def _truth(context: Context, sizes: Sequence[int]) -> dict[str, Tensor]:
    """Parameters after the same steps in one process, by their names in the model."""
    one, other = (layer.cpu() for layer in _linears(context))
    oracle = Oracle(context.under_test, 4, {})
    assert oracle.weight is not None
    assert oracle.bias is not None
    named = {f"0.{k}": p for k, p in one.named_parameters()} | {
        "1.weight": oracle.weight,
        "1.bias": oracle.bias,
    }
    named |= {f"2.{k}": p for k, p in other.named_parameters()}
    optimizer = torch.optim.SGD(named.values(), lr=_RATE)
    for step in range(3):
        batch = random_batch(sum(sizes), (3,), seed=step)
        optimizer.zero_grad()
        y = torch.relu(other(oracle(one(batch.x))))
        (y - batch.cotangent[:, :2]).square().mean().backward()
        optimizer.step()
    return {name: p.detach() for name, p in named.items()}
