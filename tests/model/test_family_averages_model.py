"""Methods with averages over steps in a model: training with DDP, join, conversion, compilation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm import convert, join, prepare_ddp, revert, scale_loss
from syncnorm.family import MABN, L1BatchNorm, OnlineNorm, PowerNorm, UnifiedNorm
from syncnorm.testing import RankPool, shard

STEPS = 8
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "power": partial(PowerNorm, warmup=3),
    "mabn": partial(MABN, window=2, warmup=3, renorm_after=4),
    "unified": partial(UnifiedNorm, window=2, warmup=3, lagged=True),
    "online": OnlineNorm,
    "l1": L1BatchNorm,
}


def network(name: str | None) -> nn.Sequential:
    """A network with two norms, the same on every worker."""
    torch.manual_seed(3)
    norm = nn.BatchNorm2d if name is None else NORMS[name]
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16, 2)),
    ).double()


def batch(step: int, count: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(count, 2, 6, 6, generator=generator, dtype=torch.float64)


def trained(name: str, parts: list[Tensor], is_parallel: bool) -> dict[str, Tensor]:
    model = bare = network(name)
    if is_parallel:
        model = DistributedDataParallel(prepare_ddp(bare))
    optimizer = torch.optim.SGD(bare.parameters(), 0.05)
    for x in parts:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        (scale_loss(loss, len(x)) if is_parallel else loss).backward()
        optimizer.step()
    return dict(bare.state_dict())


@pytest.mark.parametrize("name", ["power", "mabn", "unified"])
def test_training_with_ddp_is_training_on_the_whole_batches(pool, name):
    batches = [batch(step) for step in range(STEPS)]
    parts = [shard(x, (3, 2)) for x in batches]
    by_rank = pool(2).run_each(trained, [(name, [p[r] for p in parts], True) for r in range(2)])
    for key, value in trained(name, batches, is_parallel=False).items():
        torch.testing.assert_close(by_rank[0][key], value, rtol=1e-10, atol=1e-10)
        assert torch.equal(by_rank[0][key], by_rank[1][key])


def begun_anew(name: str, path: str) -> dict[str, Tensor] | None:
    """Train on two workers, and go on with one, in a torch.distributed that is begun anew."""
    rank = dist.get_rank()
    bare = prepare_ddp(network(name))
    optimizer = torch.optim.SGD(bare.parameters(), 0.05)
    for workers, steps in ((2, range(4)), (1, range(4, STEPS))):
        model = DistributedDataParallel(bare)
        for step in steps:
            x = batch(step).chunk(workers)[rank]
            optimizer.zero_grad()
            scale_loss(model(x).square().mean(), len(x)).backward()
            optimizer.step()
        del model
        if workers == 2:
            dist.destroy_process_group()
            if rank:
                return None
            dist.init_process_group("gloo", f"file://{path}", rank=0, world_size=1)
    return dict(bare.state_dict())


@pytest.mark.parametrize("name", ["power", "mabn", "unified"])
def test_other_workers_in_one_process_go_on_with_the_averages(name, tmp_path):
    """DistributedDataParallel divides the gradients by another number of workers then."""
    with RankPool(2) as ranks:
        state, _ = ranks.run(begun_anew, name, str(tmp_path / "rendezvous"))
    batches = [batch(step) for step in range(STEPS)]
    for key, value in trained(name, batches, is_parallel=False).items():
        torch.testing.assert_close(state[key], value, rtol=1e-10, atol=1e-10)


def joined(name: str, count: int) -> dict[str, Tensor]:
    """Train on `count` batches, fewer than another worker's, perhaps."""
    model = DistributedDataParallel(prepare_ddp(network(name)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with join(model, optimizer):
        for step in range(count):
            optimizer.zero_grad()
            scale_loss(model(batch(step, 2)).square().mean(), 2).backward()
            optimizer.step()
    return dict(model.module.state_dict())


@pytest.mark.parametrize("counts", [(6, 4), (5, 1)], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_join(pool, name, counts):
    first, second = pool(2).run_each(joined, [(name, count) for count in counts])
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert int(first["1.num_batches_tracked"]) == counts[0]


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (MABN, {}),
        (UnifiedNorm, {}),
        (PowerNorm, {"scaling_groups": 0}),
        (OnlineNorm, {"guard": None}),
    ],
)
def test_convert_and_revert(cls: type, options: dict[str, Any]):
    model = network(None)
    for step in range(3):
        model(batch(step))
    weight = model[1].weight
    convert(model, cls, **options)
    for step in range(3):
        model(batch(step)).sum().backward()
    expected = model.eval()(batch(9))
    assert type(revert(model)[1]) is nn.BatchNorm2d
    assert model[1].weight is weight
    torch.testing.assert_close(model(batch(9)), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NORMS)
def test_compiled_code_calls_them(name):
    # But for rounding: compiled code has weight and bias in operators of its own.
    same = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    plain, model = network(name), network(name)
    compiled = torch.compile(model, backend="eager")
    for step in range(5):
        y, expected = compiled(batch(step)), plain(batch(step))
        y.square().sum().backward()
        expected.square().sum().backward()
        same(y, expected)
    for one, two in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        same(one, two)
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        same(one.grad, two.grad)


def head_shared_by(calls: int, parts: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """u and v of an OnlineNorm that is called several times before the backward pass, each step."""
    torch.manual_seed(3)
    norm = OnlineNorm(2, gradient_momentum=0.1).to(dtype)
    model = prepare_ddp(norm)
    found = []
    for x in parts:
        outputs = [model((i + 1) * x.to(dtype)) for i in range(calls)]
        sum(y.sin().sum() for y in outputs).backward()
        found.append(torch.stack([norm.u, norm.v]))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_workers_agree_on_gradient_averages_after_several_calls(pool, calls, dtype):
    """What a later call sends is without the average of an earlier one, which is still under way.

    Taken as they came, the averages of 3 calls made the workers' difference twice as large a step.
    """
    parts = [shard(batch(step), (3, 2)) for step in range(30)]
    one, other = pool(2).run_each(
        head_shared_by, [(calls, [p[rank] for p in parts], dtype) for rank in range(2)]
    )
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)
    assert 0 < one[-1].abs().max() < 100
