"""SAM on uneven workers takes the steps of one process; and training normalisation layers alone."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm import (
    SAM,
    SyncBatchNorm,
    SyncBatchRenorm,
    accumulate,
    convert,
    prepare_ddp,
    scale_loss,
    train_only_norms,
)
from syncnorm.comm import exchange
from syncnorm.errors import InputError
from syncnorm.family import EvoNorm, L1BatchNorm
from syncnorm.model import sharpness
from syncnorm.model.norm_parameters import norm_parameters
from syncnorm.testing import assert_close, shard

STEPS = 4
SPLITS = [(5,), (3, 2), (5, 0), (1, 0, 4)]
RHO = 0.3


def make() -> nn.Sequential:
    """Two batch norms and a layer norm, of torch's."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4),
        nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2),
    ).double()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, dtype=p.dtype)
    return model


def data(step: int, count: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(20 + step)
    return tuple(torch.randn(count, n, generator=g, dtype=torch.float64) + 1 for n in (3, 2))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().sum() / max(1, len(x))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def oracle(count: int, perturbs_all: bool) -> dict[str, Tensor]:
    """The equations in one process, step by step."""
    model = make()
    optimizer = optimizer_of(model)
    parameters = [*model.parameters()]
    chosen = parameters if perturbs_all else [p for i in (1, 4, 6) for p in model[i].parameters()]
    for step in range(STEPS):
        x, y = data(step, count)
        gradient = torch.autograd.grad(loss_of(model, x, y), chosen)
        running = [b.clone() for b in model.buffers()]
        norm = sum(g.square().sum() for g in gradient).sqrt()
        before = [p.detach().clone() for p in chosen]
        with torch.no_grad():
            for p, g in zip(chosen, gradient):
                p += RHO * g / norm
        uphill = torch.autograd.grad(loss_of(model, x, y), parameters)
        with torch.no_grad():
            for p, was in zip(chosen, before):
                p.copy_(was)
            for buffer, was in zip(model.buffers(), running):
                buffer.copy_(was)
        for p, g in zip(parameters, uphill):
            p.grad = g
        optimizer.step()
    return model.state_dict()


def train(parts: list[tuple[Tensor, Tensor]], perturbs_all: bool, defect: str) -> dict[str, Any]:
    """Take steps on this rank's shards; the state at the end, and what was sent in a step."""
    model = prepare_ddp(convert(make()))
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    sam = SAM(optimizer, ddp, RHO, model.parameters() if perturbs_all else None)
    with pytest.MonkeyPatch.context() as patch:
        if defect == "not frozen":
            patch.setattr(sharpness, "frozen_statistics", contextlib.nullcontext)
        elif defect == "norm over all":
            patch.setattr(sharpness, "get_total_norm", lambda _: norm_of(model.parameters()))
        elif defect == "local gradient":
            sam.model = model
        for x, y in parts:
            with exchange.record() as made:
                sam.step(partial(scaled, sam.model, x, y))
    return {"state": model.state_dict(), "sent": [e.kind for e in made]}


def scaled(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The closure of a worker with a part of a batch."""
    loss = loss_of(model, x, y)
    scale_loss(loss, len(x)).backward()
    return loss.detach()


def norm_of(parameters: Any) -> Tensor:
    return torch.stack([p.grad.norm() for p in parameters]).norm()


def run(pool, sizes: tuple[int, ...], perturbs_all: bool, defect: str = "") -> list[dict[str, Any]]:
    shards = [list(zip(*(shard(t, sizes) for t in data(s, sum(sizes))))) for s in range(STEPS)]
    return pool(len(sizes)).run_each(
        train, [([s[r] for s in shards], perturbs_all, defect) for r in range(len(sizes))]
    )


def check(ranks: list[dict[str, Any]], count: int, perturbs_all: bool) -> None:
    for key, expected in oracle(count, perturbs_all).items():
        for rank in ranks:
            assert_close(rank["state"][key].double(), expected.double(), torch.float64, key)
            assert torch.equal(rank["state"][key], ranks[0]["state"][key])


@pytest.mark.parametrize("perturbs_all", [False, True])
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_steps_of_uneven_workers_are_those_of_one_process(pool, sizes, perturbs_all):
    ranks = run(pool, sizes, perturbs_all)
    check(ranks, sum(sizes), perturbs_all)
    if len(sizes) > 1:
        # Two batch norms forward and backward, and the count of scale_loss; twice.
        kinds = [kind for kind in ranks[0]["sent"] if kind in ("moments", "gradients")]
        assert kinds == (["moments"] * 2 + ["gradients"] * 2) * 2
        assert len(ranks[0]["sent"]) == 10


@pytest.mark.parametrize("defect", ["not frozen", "norm over all", "local gradient"])
def test_a_planted_defect_is_seen(pool, defect):
    ranks = run(pool, (3, 2), False, defect)
    with pytest.raises(AssertionError):
        check(ranks, 5, False)


def one() -> tuple[nn.Module, torch.optim.Optimizer, SAM]:
    model = convert(make())
    optimizer = optimizer_of(model)
    return model, optimizer, SAM(optimizer, model, RHO)


def closure_of(
    model: nn.Module, scale: Callable[[Tensor], Tensor] = lambda loss: loss, micro_batches: int = 1
) -> Any:
    x, y = data(0, 6)

    def closure() -> Tensor:
        with accumulate(model):
            for part_x, part_y in zip(x.chunk(micro_batches), y.chunk(micro_batches)):
                loss = loss_of(model, part_x, part_y) / micro_batches
                scale(loss).backward()
        return loss

    return closure


def test_micro_batches_belong_into_the_closure():
    model, optimizer, sam = one()
    closure = closure_of(model, micro_batches=2)
    sam.step(closure)
    assert int(model[1].num_batches_tracked) == 1
    assert all(p.grad is None for p in model.parameters())
    optimizer.zero_grad()
    closure()
    with pytest.raises(InputError, match="got gradients that were there before"):
        sam.step(closure)


def one_step(sync: str) -> tuple[list[int], dict[str, Tensor]]:
    """A step of layers that act together and of one of the family; their counters."""
    model = convert(make(), sync=sync)
    model.insert(8, L1BatchNorm(4).double())
    model = prepare_ddp(model)
    ddp = DistributedDataParallel(model)
    sam = SAM(optimizer_of(model), ddp, RHO)
    for step in range(2):
        x, y = data(step, 3)
        sam.step(partial(scaled, ddp, x, y))
    counters = [int(model[i].num_batches_tracked) for i in (1, 6, 8)]
    return counters, {key: p.detach() for key, p in model.named_parameters()}


@pytest.mark.parametrize("sync", ["running", "lagged"])
def test_layers_that_act_together_and_the_familys_follow_once_a_step(pool, sync):
    (counters, first), (others, second) = pool(2).run(one_step, sync)
    assert counters == others == [2, 2, 2]
    assert all(torch.equal(p, second[key]) for key, p in first.items())


@pytest.mark.parametrize("overflows", [False, True])
def test_a_scaler(overflows):
    """The scale has no part in the direction; a step that overflows is left out."""
    model, _, sam = one()
    plain, _, other = one()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    factor = float("inf") if overflows else 1.0
    sam.step(closure_of(model, lambda loss: scaler.scale(loss * factor)), scaler)
    scaler.update()
    other.step(closure_of(plain))
    assert scaler.get_scale() == (512 if overflows else 1024)
    for (key, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_close(p, before[key] if overflows else q, torch.float64, key)


def test_a_closure_that_raises_leaves_parameters_and_statistics():
    model, _, sam = one()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    closure, calls = closure_of(model), []

    def raises() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the second time")
        return closure()

    with pytest.raises(RuntimeError, match="the second time"):
        sam.step(raises)
    for key, p in model.named_parameters():
        assert torch.equal(p, before[key])
    assert all(
        not layer.has_frozen_statistics
        for layer in model.modules()
        if isinstance(layer, SyncBatchNorm)
    )


def test_without_a_gradient_nothing_is_perturbed():
    model, _, sam = one()
    with pytest.raises(InputError, match="must call backward, got no gradient of a parameter"):
        sam.step(lambda: torch.zeros(()))
    seen = []

    def flat() -> Tensor:
        loss = (model(data(0, 6)[0]) * 0).sum()
        loss.backward()
        seen.append([p.detach().clone() for p in model.parameters()])
        return loss

    sam.step(flat)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (lambda m, o: SAM(o, m, -1), "`rho` must be finite and >= 0, got -1"),
        (lambda m, o: SAM(torch.optim.LBFGS(m.parameters()), m), "`optimizer` must step without a closure, got LBFGS"),
        (lambda m, o: SAM(o, m[0]), "`parameters` must hold a parameter to perturb, got none"),
    ],
)  # fmt: skip
def test_bad_arguments(make_one, message):
    model, optimizer, _ = one()
    with pytest.raises(InputError, match=re.escape(message)):
        make_one(model, optimizer)


def test_batch_norms_of_torch_alone_are_an_error_before_anything_moves():
    model = make()
    before = [p.detach().clone() for p in model.parameters()]
    sam = SAM(optimizer_of(model), model)
    with pytest.raises(InputError, match="must have layers of ours for frozen_statistics"):
        sam.step(lambda: loss_of(model, *data(0, 6)).backward())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


# Training normalisation layers only.


class T5LayerNorm(nn.Module):
    """As transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class NormedBlock(nn.Module):
    """Its name is no sign: it has a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(4, 4))
        self.norm = nn.GroupNorm(2, 4)


def test_only_normalisation_layers_are_trained():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), SyncBatchNorm(4), SyncBatchRenorm(4), nn.LayerNorm(4),
        nn.RMSNorm(4), nn.InstanceNorm2d(4, affine=True), T5LayerNorm(), NormedBlock(), EvoNorm(4),
        L1BatchNorm(4), nn.Linear(4, 2), nn.BatchNorm2d(4, affine=False),
    )  # fmt: skip
    model[3].eval()
    assert train_only_norms(model) is model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    pairs = {f"{i}.{name}" for i in (1, 2, 3, 4, 6, 9, 10) for name in ("weight", "bias")}
    assert trained == pairs | {"5.weight", "7.weight", "8.norm.weight", "8.norm.bias", "9.v"}
    assert trained == {*norm_parameters(model)}
    assert model[1].training
    assert not model[3].training


class NormedConv(nn.Conv2d):
    """No normalisation layer."""


def test_a_parametrized_layer_with_norm_in_its_name_is_none():
    layer = nn.utils.parametrizations.weight_norm(NormedConv(3, 4, 3))
    assert norm_parameters(nn.Sequential(layer)) == {}


def test_of_a_parametrized_norm_the_originals_are_trained():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for name in ("weight", "bias"):
        nn.utils.parametrize.register_parametrization(model[1], name, nn.Softplus())
    trained = {name for name, p in train_only_norms(model).named_parameters() if p.requires_grad}
    assert trained == {f"1.parametrizations.{name}.original" for name in ("weight", "bias")}


def test_a_model_without_such_layers():
    with pytest.raises(InputError, match="got none in Sequential"):
        train_only_norms(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)))
