"""Models, data and problems for the tests of diagnoses; functions that ranks of a pool call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncnorm import SyncBatchNorm
from syncnorm.comm import exchange, groups
from syncnorm.diagnose import Forward, Problem, diagnose
from syncnorm.errors import FaultError
from syncnorm.family import PowerNorm
from syncnorm.placement import shard

CLASSES = 3


def network(make_norm: Callable[..., nn.Module] = SyncBatchNorm, seed: int = 0) -> nn.Module:
    """Two convolutions with norms, and a linear layer, in float64; statistics are not the data's."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), make_norm(4), nn.ReLU(),
        nn.Conv2d(4, 3, 3, padding=1), make_norm(3), nn.ReLU(),
        nn.Flatten(), nn.Linear(3 * 16, CLASSES),
    ).double()  # fmt: skip
    for module in model.modules():
        mean = getattr(module, "running_mean", None)
        if mean is not None:
            mean.add_(0.3)
    return model


def samples(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of 4x4, and classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64) * 2 + 1
    return x, torch.randint(CLASSES, (count,), generator=generator)


def cross_entropy(model: nn.Module, batch: Any) -> dict[str, tuple[Tensor, float]]:
    x, y = batch
    return {"": (F.cross_entropy(model(x), y, reduction="sum"), float(len(y)))}


def two_terms(model: nn.Module, batch: Any) -> dict[str, tuple[Tensor, float]]:
    """One term counts samples, the other those of class 0."""
    x, y = batch
    out = model(x)
    chosen = out[y == 0].square().sum()
    return {"ce": (F.cross_entropy(out, y, reduction="sum"), float(len(y)))} | {
        "zero": (chosen, float((y == 0).sum()))
    }


def problem_of(
    model: nn.Module,
    data: Sequence[tuple[Tensor, Tensor]],
    parts: Sequence[int],
    *,
    pooled: bool = True,
    rank: int = 0,
    world_size: int = 1,
    loss: Callable[..., Any] = cross_entropy,
    lr: float = 0.1,
    **options: Any,
) -> Problem:
    """Share out the parts of each batch in whole ones: one forward, or one for each part."""
    mine = shard(len(parts), rank, world_size)
    ends = torch.tensor([0, *parts]).cumsum(0).tolist()
    batches = []
    for x, y in data:
        own = {p: parts[p] for p in range(mine.start, mine.stop)}
        groups_of = [own] if pooled else [{p: n} for p, n in own.items() if n]
        forwards = []
        for some in groups_of:
            rows = [i for p in some for i in range(ends[p], ends[p + 1])]
            forwards.append(Forward((x[rows], y[rows]), some))
        batches.append(forwards)
    sizes = [sum(parts)] if pooled else [n for n in parts if n]
    return Problem(
        model, loss, batches, parts=len(parts), samples=min(sizes), lr=lr, **options
    )  # fmt: skip


def everything_of(
    parts: Sequence[int], name: str = "pooled", defect: str | None = None
) -> tuple[dict[str, Any], bool]:
    """Diagnose on this rank's parts; also whether the model is as it was."""
    pooled = name != "local"
    made = {"pooled": SyncBatchNorm, "local": nn.BatchNorm2d, "terms": SyncBatchNorm}
    model = network(made.get(name, PowerNorm))
    early = network(made.get(name, PowerNorm), seed=1)
    data = [samples(sum(parts), seed) for seed in (0, 1)]
    world = groups.statistics_group()
    size = len(groups.ranks(world))
    problem = problem_of(
        model, data, parts, pooled=pooled, rank=groups.rank(), world_size=size,
        loss=two_terms if name == "terms" else cross_entropy,
    )  # fmt: skip
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.train()
    model[1].eval()
    if defect is not None:
        sent = problem.sum
        # Sent, so that the workers stay together, but not heeded.
        problem.sum = lambda message, what: [sent(message, what), message][what == defect]  # type: ignore[method-assign]
    found = diagnose(problem, early).measures
    after = model.state_dict()
    is_same = all(torch.equal(before[name], after[name]) for name in before)
    is_same &= torch.equal(random, torch.get_rng_state()) and model.training
    is_same &= not model[1].training and all(p.grad is None for p in model.parameters())
    return found, is_same


class Breaks(nn.Module):
    """Fails for large inputs."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() and x.max() > 100:
            raise ValueError("too large")
        return x


def failing(what: str) -> str:
    """Diagnose a model that fails on the last rank, or parts that are not there; return the error."""
    x, y = samples(5)
    world = groups.statistics_group()
    rank, size = groups.rank(), len(groups.ranks(world))
    x[-1] = 1000.0
    model = nn.Sequential(Breaks(), network())
    problem = problem_of(model, [(x, y)], (2, 2, 1), rank=rank, world_size=size)
    if what == "part":
        problem.model = network()
        if rank == size - 1:
            problem.batches = [[Forward(problem.batches[0][0].batch, {3: 1})]]
    try:
        diagnose(problem)
    except FaultError as error:
        # All are at the same place still.
        total = exchange.sum_(torch.ones(1, dtype=torch.float64), world, "diagnosis", "after")
        return f"{error} {total.item():g}"
    raise AssertionError("it has not failed")
