"""Each measure against what its definition gives by hand, on one worker."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from syncnorm import SyncBatchNorm
from syncnorm.diagnose import Forward, Problem, diagnose, observe, shift, surface
from syncnorm.diagnose.covariate import measure_covariate_shift
from syncnorm.diagnose.gradients import measure_gradients, slope
from syncnorm.diagnose.shift import measure_shift
from syncnorm.diagnose.smoothness import measure_smoothness
from syncnorm.diagnose.statistics import measure_statistics
from syncnorm.diagnose.surface import measure_surface
from syncnorm.errors import FaultError, InputError
from syncnorm.family import EstimatedBatchNorm, EvoNorm, L1BatchNorm, PowerNorm
from tests.diagnose import cases

PARTS = (3, 2, 4)
EPS = 1e-5


def _begun(problem: Problem) -> Problem:
    problem.begin()
    return problem


@pytest.fixture
def model() -> nn.Module:
    return cases.network(nn.BatchNorm2d)


@pytest.fixture
def problem(model) -> Problem:
    return _begun(cases.problem_of(model, [cases.samples(9)], PARTS))


def _plain_gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, dict[str, Tensor]]:
    copy = cases.network(nn.BatchNorm2d)
    copy.load_state_dict(model.state_dict())
    copy.train()
    loss = F.cross_entropy(copy(x), y)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in copy.named_parameters()}


def test_shares_and_gaps_by_hand(model, problem):
    x, _ = cases.samples(9)
    h = model[0](x)  # what enters the first norm
    c = h.transpose(0, 1).flatten(1)
    mean, var = c.mean(1), c.var(1, correction=0)
    found = measure_statistics(problem)
    layer = found["layers"]["1"]
    pieces = [p.transpose(0, 1).flatten(1) for p in h.split(PARTS)]
    within = sum(((p - p.mean(1, keepdim=True)) ** 2).sum(1) for p in pieces)
    m2 = var * c.shape[1]
    share = ((m2 - within) / (m2 + c.shape[1] * EPS)).mean().item()
    sigma = (var + EPS).sqrt()
    gaps = [((p.mean(1) - mean) / sigma).square().mean().sqrt().item() for p in pieces]
    assert layer["between_share"] == pytest.approx(share, rel=1e-9)
    means = h.mean((2, 3))  # (9, 4)
    of_samples = 16 * ((means - mean) ** 2).sum(0)
    chance = (2 / 8 * of_samples / (m2 + c.shape[1] * EPS)).mean().item()
    assert layer["chance_share"] == pytest.approx(chance, rel=1e-9)
    assert layer["part_gaps"] == pytest.approx(gaps, rel=1e-9)
    gap = ((0.3 - mean) / sigma).square().mean().sqrt().item()
    assert layer["mean_gap"] == pytest.approx(gap, rel=1e-9)
    log = (((1 + EPS) / (var + EPS)).log() / 2).square().mean().sqrt().item()
    assert layer["var_gap"] == pytest.approx(log, rel=1e-9)
    assert layer["values"] == 9 * 16
    assert not layer["is_pooled"]


def test_a_model_that_has_been_compiled_is_measured_as_it_was_written(model):
    compiled = torch.compile(model, backend="eager")
    compiled(cases.samples(9)[0])
    data = [cases.samples(9)]
    found, expected = (
        diagnose(cases.problem_of(m, data, PARTS), only=["statistics"]).measures["statistics"]
        for m in (compiled, model)
    )
    assert found["loss"] == expected["loss"]
    assert [*found["layers"].values()] == [*expected["layers"].values()]


def test_samples_shared_out_at_random_have_the_share_of_chance(model):
    x, y = cases.samples(60)
    x = x + 3 * torch.randn(60, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    shares, chances = [], []
    for seed in range(40):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        problem = _begun(cases.problem_of(model, [(x[order], y[order])], (10, 20, 30)))
        layer = measure_statistics(problem)["layers"]["1"]
        shares.append(layer["between_share"])
        chances.append(layer["chance_share"])
    assert max(chances) == pytest.approx(min(chances))
    assert sum(shares) / 40 == pytest.approx(chances[0], rel=0.25)


def test_losses_in_three_modes_by_hand(model, problem):
    x, y = cases.samples(9)
    found = measure_statistics(problem)["loss"]
    with torch.no_grad():
        evaluation = F.cross_entropy(model.eval()(x), y).item()
        training = F.cross_entropy(model.train()(x), y).item()
        # Momentum 1 makes the running statistics those of this batch.
        for norm in (model[1], model[4]):
            norm.momentum = 1.0
        model(x)
        population = F.cross_entropy(model.eval()(x), y).item()
    assert found["evaluation"] == pytest.approx(evaluation, rel=1e-12)
    assert found["training"] == pytest.approx(training, rel=1e-12)
    assert found["population"] == pytest.approx(population, rel=1e-12)
    assert abs(evaluation - population) > 1e-3


def test_a_mean_of_the_data_is_not_put_beside_an_old_deviation():
    """Their mix is by neither statistics: its loss could be larger than that of both."""
    problem = _begun(cases.problem_of(cases.network(L1BatchNorm), [cases.samples(9)], PARTS))
    found = measure_statistics(problem)["loss"]
    assert found["population"] == pytest.approx(found["evaluation"], rel=1e-12)
    assert abs(found["training"] - found["evaluation"]) > 1e-3


def test_gradients_by_depth_by_hand(model, problem):
    x, y = cases.samples(9)
    found = measure_gradients(problem)
    loss, gradient = _plain_gradient(model, x, y)
    assert found["loss"] == pytest.approx(loss, rel=1e-12)
    for name in ("0", "3", "7"):
        weight, g = model[int(name)].weight, gradient[f"{name}.weight"]
        layer = found["layers"][name]
        assert layer["gradient"] == pytest.approx(g.norm().item(), rel=1e-9)
        assert layer["weight"] == pytest.approx(weight.norm().item(), rel=1e-9)
        assert layer["effective_lr"] == pytest.approx(0.1 / weight.norm().item() ** 2)
        ratio = 0.1 * (g.norm() / weight.norm()).item()
        assert layer["update_ratio"] == pytest.approx(ratio, rel=1e-9)
    # A loss that is a sum over samples: the last layer's output is the loss's input.
    model.train()
    out = model(x).detach().requires_grad_()
    F.cross_entropy(out, y, reduction="sum").backward()
    by_hand = (out.grad.square().sum() / 9).sqrt().item()
    assert found["layers"]["7"]["activation"] == pytest.approx(by_hand, rel=1e-9)


def test_weights_in_front_of_a_norm_are_orthogonal_to_their_gradient(problem):
    layers = measure_gradients(problem)["layers"]
    assert [layers[name]["is_invariant"] for name in ("0", "3", "7")] == [True, True, False]
    assert abs(layers["0"]["cosine"]) < 1e-4 > abs(layers["3"]["cosine"])
    assert abs(layers["7"]["cosine"]) > 1e-2


class Branches(nn.Module):
    """A linear layer in front of a norm, called or used in two places."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.linear, self.head = how, nn.Linear(4, 4), nn.Linear(4, cases.CLASSES)
        self.norm = SyncBatchNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        if self.how == "a view of a view":
            y = self.norm(out.unsqueeze(2).unsqueeze(3)).flatten(1).relu()
        elif self.how == "a view":
            y = self.norm(out.unsqueeze(2)).squeeze(2).relu()
        else:
            y = self.norm(out).relu()
        if self.how == "a shortcut":
            y = y + out.tanh()
        elif self.how == "two norms":
            y = y + self.norm(out).tanh()
        elif self.how == "two calls":
            y = self.linear(y).tanh()
        return self.head(y)


def _rows(count: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(cases.CLASSES, (count,), generator=generator)


@pytest.mark.parametrize(
    ("how", "is_invariant"),
    [
        ("", True),
        ("a view", True),
        ("a view of a view", True),
        ("two norms", True),
        ("a shortcut", False),
        ("two calls", False),
    ],
)
def test_weights_are_invariant_if_norms_alone_see_their_outputs(how, is_invariant):
    torch.manual_seed(1)
    problem = _begun(cases.problem_of(Branches(how).double(), [_rows(), _rows()], (16, 16)))
    layer = measure_gradients(problem)["layers"]["linear"]
    assert layer["is_invariant"] == is_invariant
    assert (abs(layer["cosine"]) < 1e-3) == is_invariant


def test_values_are_those_of_one_call():
    model = Branches("two norms").double()
    found = measure_statistics(_begun(cases.problem_of(model, [_rows()], (16, 16))))
    assert found["layers"]["norm"]["values"] == 32


def test_a_layer_that_is_not_called_has_no_figures():
    model = Branches("").double()
    model.other = SyncBatchNorm(3)
    found = measure_statistics(_begun(cases.problem_of(model, [_rows()], (16, 16))))
    assert found["layers"]["other"]["flat_share"] == found["layers"]["other"]["values"] == 0
    assert found["layers"]["other"]["mean_gap"] is None


class Masked(nn.Module):
    """Sequences of up to 10, of which the mask says where they end."""

    def __init__(self, norm: nn.Module, scale: float) -> None:
        super().__init__()
        self.norm, self.head, self.scale = norm, nn.Linear(4, cases.CLASSES), scale

    def forward(self, x: Tensor) -> Tensor:
        mask = (x[:, :1] < 50).double()
        weighted = self.norm(mask=self.scale * mask, x=x) * mask
        return self.head(weighted.sum(2) / mask.sum(2))


@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("make", [SyncBatchNorm, PowerNorm])
def test_what_a_mask_leaves_out_is_left_out(make, scale):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, 10, generator=generator, dtype=torch.float64)
    lengths = torch.randint(2, 11, (32,), generator=generator)
    is_end = torch.arange(10) >= lengths.view(-1, 1, 1)
    x, y = x.masked_fill(is_end, 60.0), torch.arange(32) % cases.CLASSES
    problem = _begun(cases.problem_of(Masked(make(4), scale).double(), [(x, y)], (16, 16)))
    layer = measure_statistics(problem)["layers"]["norm"]
    values = x.movedim(1, -1)[~is_end[:, 0]]
    mean, var = values.mean(0), values.var(0, correction=0)
    assert layer["values"] == pytest.approx(scale * len(values))
    _, sums = observe.observe(problem, problem.everything)
    for got, expected in zip(sums["norm"].moments(), (mean, var), strict=True):
        torch.testing.assert_close(got, expected)
    if make is SyncBatchNorm:
        gap = (mean / (var + EPS).sqrt()).square().mean().sqrt()
        assert layer["mean_gap"] == pytest.approx(gap.item())
        gaps = [((x.movedim(1, -1)[part][~is_end[part, 0]].mean(0) - mean) / (var + EPS).sqrt())
                for part in (slice(16), slice(16, 32))]  # fmt: skip
        expected = [gap.square().mean().sqrt().item() for gap in gaps]
        assert layer["part_gaps"] == pytest.approx(expected)
    same = measure_shift(problem, problem.model)["layers"]["norm"]
    assert same["histogram"]["max"] == 0
    edges = {"norm": (mean - 100 * var.sqrt(), mean + 100 * var.sqrt())}
    assert shift._histograms(problem, edges)["norm"].sum(1).tolist() == pytest.approx(
        [scale * len(values)] * 4
    )


def _with_nothing(
    model: nn.Module, batch: tuple[Tensor, Tensor]
) -> dict[str, tuple[Tensor, float]]:
    found = cases.cross_entropy(model, batch)
    return {**found, "nothing": (0 * found[""][0], 0.0)}


def test_a_term_that_counts_nothing_is_left_out(model):
    losses = []
    for loss in (cases.cross_entropy, _with_nothing):
        problem = cases.problem_of(model, [cases.samples(9)], PARTS, loss=loss)
        losses.append(measure_statistics(_begun(problem))["loss"])
    assert losses[0] == losses[1]


def test_estimates_normalise_as_in_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), EstimatedBatchNorm(4), nn.Linear(4, 3)).double()
    model[1].running_mean += 8
    x, y = _rows()
    loss = measure_statistics(_begun(cases.problem_of(model, [(x, y)], (16, 16))))["loss"]
    with torch.no_grad():
        evaluation = F.cross_entropy(model.eval()(x), y).item()
        training = F.cross_entropy(model.train()(x), y).item()
    assert loss["training"] == pytest.approx(training, rel=1e-9)
    assert loss["evaluation"] == pytest.approx(evaluation, rel=1e-9)
    assert abs(training - evaluation) > 0.1


def test_a_running_mean_that_is_not_kept_has_no_gap():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), EvoNorm(4), nn.Flatten(), nn.Linear(16, 3)).double()
    problem = _begun(cases.problem_of(model, [cases.samples(9)], PARTS))
    assert measure_statistics(problem)["layers"]["1"]["mean_gap"] is None


def _untrained() -> dict[str, Any]:
    model = cases.network().requires_grad_(False)
    problem = cases.problem_of(
        model, [cases.samples(9)], (4, 5), rank=dist.get_rank(), world_size=dist.get_world_size()
    )
    return measure_gradients(_begun(problem))


def test_a_model_that_is_not_trained_has_no_gradient(pool):
    for world_size in (1, 2):
        for found in pool(world_size).run(_untrained):
            assert found["norm"] == 0
            assert found["layers"]["0"]["gradient"] is None


def test_a_relu_in_place_between_a_convolution_and_a_norm_is_seen():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)
    ).double()
    problem = _begun(cases.problem_of(model, [cases.samples(9)], PARTS))
    assert not measure_gradients(problem)["layers"]["0"]["is_invariant"]


def test_slope():
    assert slope([1.0, 3.0, 5.0, 7.0]) == pytest.approx(2.0)
    assert slope([1.0]) is None


class Quadratic(nn.Module):
    """The loss is w A w / 2 for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
        self.a = torch.diag(torch.tensor([1.0, 9.0, 4.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.w @ self.a @ self.w / 2).expand(len(x))


def _mean(model, batch):
    return {"": (model(batch).sum(), float(len(batch)))}


def test_smoothness_of_a_quadratic_is_its_curvature():
    model, x = Quadratic(), torch.zeros(4, 1)
    before = model.w.detach().clone()
    problem = Problem(
        model, _mean, [[Forward(x, {0: 4})]], parts=1, samples=4, lr=0.05
    )  # fmt: skip
    problem.begin()
    found = measure_smoothness(problem, (1.0, 2.0))
    g = model.a @ before
    curvature = ((model.a @ g).norm() / g.norm()).item()
    assert found["smoothness"] == pytest.approx(curvature, rel=1e-9)
    assert found["norm"] == pytest.approx(g.norm().item(), rel=1e-12)
    change = (0.05 * model.a @ g).norm().item()
    assert found["predictiveness"] == pytest.approx([change, 2 * change], rel=1e-9)
    losses = [(w @ model.a @ w / 2).item() for w in (before - a * g for a in (0.05, 0.1))]
    assert found["losses"] == pytest.approx(losses, rel=1e-9)
    assert found["loss_range"] == pytest.approx([min(losses), max(losses)], rel=1e-9)
    assert torch.equal(model.w, before)


def normal(mean: float, var: float) -> tuple[Tensor, Tensor]:
    return torch.tensor([mean], dtype=torch.float64), torch.tensor([var], dtype=torch.float64)


def test_divergence_of_normal_distributions():
    # D(N(1, 4) || N(0, 1)) = log(1/2) + (4 + 1) / 2 - 1/2
    found = shift.gaussian_divergence(normal(1.0, 4.0), normal(0.0, 1.0), 0.0)
    assert found.item() == pytest.approx(-math.log(2) + 2)
    assert shift.gaussian_divergence(normal(1.0, 4.0), normal(1.0, 4.0), EPS).item() == 0
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, 200_000, generator=generator, dtype=torch.float64)
    values = drawn * torch.tensor([[1.2], [1.0]]) + torch.tensor([[0.3], [0.0]])
    counts = [torch.histc(v, shift.BINS, -4.8, 4.8)[None] for v in values]
    exact = shift.gaussian_divergence(normal(0.3, 1.44), normal(0.0, 1.0), 0.0).item()
    assert shift.histogram_divergence(*counts).item() == pytest.approx(exact, rel=0.05)


def test_shift_is_none_from_itself_and_grows_with_the_weights(problem, model):
    same = cases.network(nn.BatchNorm2d)
    layers = measure_shift(problem, same)["layers"]
    assert layers["1"]["gaussian"]["max"] == pytest.approx(0, abs=1e-12)
    assert layers["1"]["histogram"]["max"] == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        same[0].weight.mul_(2)
    layers = measure_shift(problem, same)["layers"]
    x, _ = cases.samples(9)
    c = model[0](x).transpose(0, 1).flatten(1)
    mean, var = c.mean(1), c.var(1, correction=0)
    ratio = (4 * var + EPS) / (var + EPS)
    by_hand = -ratio.log() / 2 + (ratio + mean.square() / (var + EPS)) / 2 - 0.5
    assert layers["1"]["gaussian"]["max"] == pytest.approx(by_hand.max().item(), rel=1e-9)
    assert layers["1"]["histogram"]["max"] > 0.1
    assert torch.equal(model[0].weight * 2, same[0].weight)


def test_covariate_shift_by_hand(model, problem):
    x, y = cases.samples(9)
    _, g = _plain_gradient(model, x, y)
    found = measure_covariate_shift(problem, most=99)
    moved = cases.network(nn.BatchNorm2d)
    names = list(g)
    first = names.index("7.weight")
    with torch.no_grad():
        for name, p in moved.named_parameters():
            if names.index(name) < first:
                p -= 0.1 * g[name]
    _, there = _plain_gradient(moved, x, y)
    change = torch.cat([(g[n] - there[n]).flatten() for n in ("7.weight", "7.bias")]).norm().item()
    assert found["gradients"]["7"]["change"] == pytest.approx(change, rel=1e-9)
    assert 0.5 < found["gradients"]["7"]["cosine"] < 1
    assert list(found["gradients"]) == ["1", "3", "4", "7"]
    # The first layer's weights move, so what enters the first norm does; 0 before them.
    old, new = (m[0](x).transpose(0, 1).flatten(1) for m in (model, moved))
    drift = (new.mean(1) - old.mean(1)) / (old.var(1, correction=0) + EPS).sqrt()
    by_hand = drift.square().mean().sqrt().item()
    assert found["inputs"]["1"]["mean_drift"] == pytest.approx(by_hand, rel=1e-9)


def test_some_layers_stand_for_all(problem):
    assert list(measure_covariate_shift(problem, most=2)["gradients"]) == ["1", "7"]


def test_the_surface_has_the_losses_of_the_three_modes_in_its_middle(problem):
    found = measure_surface(problem, points=3)
    losses = measure_statistics(problem)["loss"]
    assert found["axis"] == [-1.0, 0.0, 1.0]
    middle = {mode: values[1][1] for mode, values in found["modes"].items()}
    assert middle["evaluation"] == pytest.approx(losses["evaluation"], rel=1e-12)
    assert middle["batch"] == pytest.approx(losses["training"], rel=1e-12)
    assert middle["recalibrated"] == pytest.approx(losses["population"], rel=1e-12)
    corner = found["modes"]["batch"][0][2]
    model = cases.network(nn.BatchNorm2d)
    directions = [surface.random_direction(problem, seed) for seed in (1, 2)]
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += directions[1][name] - directions[0][name]
        x, y = cases.samples(9)
        assert corner == pytest.approx(F.cross_entropy(model.train()(x), y).item(), rel=1e-9)


def test_filters_of_a_direction_are_as_long_as_the_weights():
    weight = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    direction = surface.filter_normalised(torch.randn_like(weight), weight)
    assert torch.allclose(direction.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1))
    assert not surface.filter_normalised(torch.ones(3), torch.ones(3)).any()


def test_an_error_leaves_the_model_as_it_was(model):
    problem = _begun(cases.problem_of(model, [cases.samples(9)], PARTS))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model[1].eval()

    def tick(cost):
        calls.append(cost)
        if len(calls) == 7:
            raise KeyboardInterrupt

    calls: list[int] = []
    problem.tick = tick
    with pytest.raises(KeyboardInterrupt):
        diagnose(problem)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.training
    assert not model[1].training


def test_the_cost_is_what_is_ticked():
    model = cases.network(SyncBatchNorm)
    done: list[int] = []
    problem = cases.problem_of(model, [cases.samples(9), cases.samples(9, 1)], PARTS)
    expected: dict[str, int] = {}

    def begin(costs, seconds):
        expected.update(costs)
        assert seconds > 0
        problem.tick = done.append

    diagnose(problem, cases.network(SyncBatchNorm, 1), begin=begin)
    # A model of few layers has fewer groups of parameters than could be chosen.
    assert sum(done) == sum(expected.values()) - 3 * (6 - 4)


def test_bad_arguments_are_refused(model):
    problem = cases.problem_of(model, [cases.samples(9)], PARTS)
    with pytest.raises(InputError, match=r"`only` must be some of statistics.*got 'colour'"):
        diagnose(problem, only=["colour"])
    with pytest.raises(InputError, match="'shift', which needs an earlier checkpoint"):
        diagnose(problem, only=["shift"])
    with pytest.raises(InputError, match="at least one batch, got none"):
        cases.problem_of(model, [], PARTS)


def test_what_a_norm_of_torchs_refuses_is_raised_before_anything_is_measured():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3)).double()
    problem = cases.problem_of(model, [cases.samples(3)], (2, 1), pooled=False)
    with pytest.raises(FaultError, match="rank 0: ValueError: Expected more than 1 value"):
        diagnose(problem)


def test_the_pages_example_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "diagnose.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(block, "docs/diagnose.md", "exec"), {})
    assert abs(float(capsys.readouterr().out.splitlines()[0])) < 1e-3


def test_bins_reach_eight_standard_deviations_about_both_means():
    low, high = shift._edges(normal(1.0, 4.0), normal(0.0, 1.0))
    assert (low.item(), high.item()) == pytest.approx((1 - 16, 1 + 16), rel=1e-4)
