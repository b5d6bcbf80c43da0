"""The tasks, the loss and the momentum of balanced batch norm."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm import SyncBatchNorm, prepare_ddp, scale_loss
from syncnorm.errors import FaultError, InputError
from syncnorm.family import BalancedBatchNorm, EvoNorm, momentum_at, tasks_of
from syncnorm.testing import shard
from tests.distributed import family_reference as reference
from tests.distributed.family_reference import close

CHANNELS, TASKS = 3, 4


def made(**options: Any) -> BalancedBatchNorm:
    layer = BalancedBatchNorm(CHANNELS, TASKS, **options).double()
    with torch.no_grad():
        layer.psi.copy_(torch.tensor([0.4, -1.0, 0.2, 2.0]))
    return layer


def data(count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    x, cotangent = torch.randn(2, count, CHANNELS, 4, generator=generator, dtype=torch.float64)
    tasks = torch.tensor([3, 0, 1, 0, 3, 0])[:count]
    return x + tasks[:, None, None], tasks, cotangent


def on_rank(x: Tensor, tasks: Tensor, cotangent: Tensor, workers: int) -> dict[str, Tensor]:
    """A step with the loss's term, which the workers' average counts once."""
    layer = made(kappa=0.5)
    x = x.clone().requires_grad_()
    y = layer(x, tasks)
    ((y * cotangent).sum() + 0.7 * layer.balance_loss() / workers).backward()
    return {"x": x.grad, "psi": layer.psi.grad, "weight": layer.weight.grad}


@pytest.mark.parametrize("sizes", [(5,), (3, 2), (5, 0), (1, 0, 4)], ids=str)
def test_the_term_of_the_loss_equals_the_whole_batch(pool, sizes):
    x, tasks, cotangent = data(5)
    parts = zip(*(shard(each, sizes) for each in (x, tasks, cotangent)))
    by_rank = pool(len(sizes)).run_each(on_rank, [(*part, len(sizes)) for part in parts])
    state = {k: v.detach().clone() for k, v in made().state_dict().items()}
    x.requires_grad_()
    wanted = [x, state["psi"].requires_grad_(), state["weight"].requires_grad_()]
    y, loss = reference.balanced_batch_norm(x, tasks, state, 0.5, 1e-5, 0.1)
    grads = torch.autograd.grad((y * cotangent).sum() + 0.7 * loss, wanted)
    close(torch.cat([r["x"] for r in by_rank]), grads[0])
    close(sum(r["psi"] for r in by_rank), grads[1])
    close(sum(r["weight"] for r in by_rank), grads[2])
    assert (grads[1][[0, 1, 3]] != 0).all()
    assert grads[1][2] == 0, "a task that is not there learns nothing"


def network() -> nn.Sequential:
    torch.manual_seed(5)
    layers = nn.Linear(2, CHANNELS), made(kappa=0.5), nn.ReLU(), nn.Linear(CHANNELS, 2)
    return nn.Sequential(*layers).double()


def train(model: nn.Module, x: Tensor, tasks: Tensor) -> dict[str, Tensor]:
    """Take three steps; the state after them."""
    bare = getattr(model, "module", model)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for _ in range(3):
        optimizer.zero_grad()
        with tasks_of(model, tasks):
            loss = model(x).square().mean() if len(x) else model(x).sum()
        loss = scale_loss(loss, len(x)) if model is not bare else loss
        (loss + 0.2 * bare[1].balance_loss()).backward()
        optimizer.step()
    return bare.state_dict()


def on_ddp(x: Tensor, tasks: Tensor) -> dict[str, Tensor]:
    return train(DistributedDataParallel(prepare_ddp(network())), x, tasks)


@pytest.mark.parametrize("sizes", [(3, 2), (5, 0)], ids=str)
def test_training_with_ddp_is_that_on_the_whole_batch(pool, sizes):
    x, tasks, _ = data(5)
    x = x[:, :2, 0]
    by_rank = pool(2).run_each(on_ddp, list(zip(shard(x, sizes), shard(tasks, sizes))))
    alone = train(network(), x, tasks)
    assert (alone["1.psi"] - network()[1].psi).abs()[[0, 1, 3]].min() > 1e-4
    for each in by_rank:
        for key, value in alone.items():
            close(each[key].double(), value.double())


def in_evaluation(x: Tensor, workers: int) -> list[Tensor]:
    """Take a step by the running statistics, and go on training; the gradients of both."""
    model = prepare_ddp(network())
    ddp = DistributedDataParallel(model) if workers > 1 else model
    kept = []
    for is_training in (False, True):
        ddp.train(is_training)
        model.zero_grad()
        loss = ddp(x).square().sum() * workers / 5
        loss.backward()
        kept += [p.grad.clone() for p in model.parameters()]
    return kept


def test_a_step_in_evaluation_mode_is_that_on_the_whole_batch(pool):
    """DDP would leave each worker its own gradients, for want of one of psi."""
    x = data(5)[0][:, :2, 0]
    by_rank = pool(2).run_each(in_evaluation, [(each, 2) for each in shard(x, (3, 2))])
    (alone,) = pool(1).run(in_evaluation, x, 1)
    psi = [n for n, _ in network().named_parameters()].index("1.psi")
    assert not alone[psi].any()
    for each in by_rank:
        for got, expected in zip(each, alone, strict=True):
            close(got, expected)


def test_a_psi_that_is_not_finite_has_no_part_in_evaluation():
    layer, x = made().eval(), data(5)[0]
    expected = layer(x)
    with torch.no_grad():
        layer.psi[0] = torch.inf
    assert torch.equal(layer(x), expected)


def test_equals_the_authors_formula_where_every_task_is_there():
    x, tasks, _ = data(6)
    layer = BalancedBatchNorm(CHANNELS, 3, momentum=1.0).double()
    tasks = tasks.clamp(max=2)
    with torch.no_grad():
        layer.psi.copy_(torch.tensor([0.4, -1.0, 2.0]))
    layer(x, tasks)
    n = tasks.bincount(minlength=3)
    share = layer.psi.exp() + n
    weights = (share / share.sum())[tasks] / n[tasks]
    mean = weights @ x.mean(2)
    var = weights @ (x - mean[:, None]).square().mean(2)
    close(layer.running_mean, mean)
    close(layer.running_var, var)


@pytest.mark.parametrize("tasks", [None, torch.full((6,), 2)], ids=["none", "one"])
def test_one_task_is_batch_norm(tasks):
    x, _, _ = data(6)
    plain = nn.BatchNorm1d(CHANNELS).double()
    close(made()(x, tasks), plain(x))


def test_without_a_momentum_the_running_statistics_are_cumulative():
    layer, same = made(momentum=None, kappa=0.7), made(kappa=0.0)
    for count in (6, 5, 4):
        x, tasks, _ = data(count)
        layer(x, tasks)
        same(x, tasks)
    close(layer.running_var, same.running_var)


def test_a_far_running_mean_costs_no_digits():
    x, tasks, _ = data(6)
    layer, exact = made().float(), made()
    y, expected = layer((x + 1e3).float(), tasks), exact((x + 1e3).float().double(), tasks)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-4)


def statistics_of(shape: tuple[int, ...]) -> tuple[list[float], list[float], int]:
    """The running statistics after a batch of this rank's shape."""
    layer = made(momentum=1.0, kappa=1.0)
    layer(torch.arange(math.prod(shape), dtype=torch.float64).view(shape))
    return layer.running_mean.tolist(), layer.running_var.tolist(), int(layer.num_batches_tracked)


def test_samples_without_positions_do_not_count(pool):
    one, other = pool(2).run_each(statistics_of, [((2, CHANNELS, 0),), ((2, CHANNELS, 3),)])
    (alone,) = pool(1).run(statistics_of, (2, CHANNELS, 3))
    assert one == other == alone
    empty, again = pool(2).run_each(statistics_of, [((2, CHANNELS, 0),), ((1, CHANNELS, 0),)])
    assert empty == again == ([0.0] * CHANNELS, [1.0] * CHANNELS, 0)


def test_a_single_value_is_one_to_all_workers(pool):
    """Whatever sizes their empty shards have."""
    one, other = pool(2).run_each(statistics_of, [((1, CHANNELS, 1),), ((0, CHANNELS, 3),)])
    assert one == other
    assert one[1] == [1.0] * CHANNELS


def wrong_tasks(tasks: list[int]) -> str:
    """Give tasks, of which some worker's are wrong."""
    layer = BalancedBatchNorm(2, 3)
    before = copy.deepcopy(layer.state_dict())
    try:
        layer(torch.ones(2, 2, 3), torch.tensor(tasks))
    except FaultError as error:
        assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("wrong", [[0, 3], [0, -1], [0], [0, 1, 2], [[0, 1]]], ids=str)
def test_wrong_tasks_are_the_same_error_on_every_worker(pool, wrong):
    by_rank = pool(2).run_each(wrong_tasks, [([0, 2],), (wrong,)])
    assert by_rank[0] == by_rank[1]
    assert by_rank[0].startswith(
        "`tasks` must be in 0 ... 2, one for each sample of x, in BalancedBatchNorm;"
    )


def test_tasks_of_a_model_reach_its_layers_within_the_block():
    x, tasks, _ = data(6)
    model = nn.Sequential(made(), nn.ReLU(), made())
    alone = copy.deepcopy(model)
    with tasks_of(model, tasks):
        y = model(x)
    close(y, alone[2](alone[1](alone[0](x, tasks)), tasks))
    assert all(layer.tasks is None for layer in (model[0], model[2]))
    assert not torch.equal(model(x), y)


def test_a_block_within_another_gives_back_the_tasks_of_the_outer_one():
    x, tasks, _ = data(6)
    layer = made()
    with tasks_of(layer, tasks):
        with tasks_of(layer, 1 - tasks.clamp(max=1)):
            pass
        layer(x, torch.zeros_like(tasks))
        assert layer.tasks is tasks
    assert layer.tasks is None


def test_copies_and_pickles_of_the_block_are_not_part_of_it():
    x, tasks, _ = data(6)
    layer = made()
    alone = copy.deepcopy(layer)(x)
    with tasks_of(layer, tasks):
        others = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))  # noqa: S301
        assert not torch.equal(layer(x), alone)
    for other in others:
        assert torch.equal(other(x), alone)


def test_a_layer_that_has_taken_a_step_is_copied_without_its_graph():
    x, tasks, _ = data(6)
    layer = made()
    layer(x.requires_grad_(), tasks)
    layer.balance_loss().backward()
    other = copy.deepcopy(layer)
    with pytest.raises(InputError, match="`balance_loss` must follow a training forward"):
        other.balance_loss()
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("kappa", [0.0, 0.1, 0.4, 1.0])
def test_the_momentum_of_a_step_follows_the_recurrence(kappa):
    eta = 0.1**kappa
    for step in range(1, 60):
        assert momentum_at(step, 0.1, kappa).item() == pytest.approx(eta, rel=1e-12)
        assert momentum_at(torch.tensor(step), 0.1, kappa).item() == pytest.approx(eta, rel=1e-12)
        eta = eta / (eta + 0.9**kappa)
    limit = {0.0: 1 / 60, 1.0: 0.1}.get(kappa)
    assert limit is None or momentum_at(60, 0.1, kappa).item() == pytest.approx(limit)


@pytest.mark.parametrize("make", [EvoNorm, SyncBatchNorm, nn.BatchNorm2d])
def test_other_layers_take_the_momentum_of_a_step(make):
    generator = torch.Generator().manual_seed(3)
    batches = torch.randn(5, 8, CHANNELS, 2, 2, generator=generator)
    layer = make(CHANNELS)
    for step, x in enumerate(batches, start=1):
        layer.momentum = float(momentum_at(step, 0.1, 0.0))
        layer(x)
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in batches])
    torch.testing.assert_close(layer.running_var, variances.mean(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BalancedBatchNorm(3, 0), "`num_tasks` must be at least 1, got 0"),
        (lambda: BalancedBatchNorm(3, 2, kappa=1.5), r"`kappa` must be in \[0, 1\].*got 1.5"),
        (lambda: momentum_at(1, 0.1, -0.5), r"`kappa` must be in \[0, 1\].*got -0.5"),
        (
            lambda: BalancedBatchNorm(3, momentum=0),
            r"`momentum` must be in \(0, 1\] to adapt, got 0",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()
