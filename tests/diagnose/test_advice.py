"""Advice where a situation was planted whose remedy is known, and silence where there is none."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncnorm import SyncBatchNorm
from syncnorm.diagnose import Problem, advise, diagnose
from syncnorm.diagnose.advice import RULES
from tests.diagnose import cases

PARTS = (16, 16, 16, 16)
ONLY = ("statistics", "gradients", "smoothness")


def _labelled(count: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images whose mean is that of their class; samples in random order."""
    x, y = cases.samples(count, seed)
    return x + 5.0 * y.double().view(-1, 1, 1, 1), y


def _sorted(seed: int = 0) -> tuple[Tensor, Tensor]:
    """The same, each worker with the labels that it has for good."""
    x, y = _labelled(seed=seed)
    order = y.argsort(stable=True)
    return x[order], y[order]


def _with_statistics_of(model: nn.Module, data: Sequence[tuple[Tensor, Tensor]]) -> nn.Module:
    """Let running statistics be those of the data."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | SyncBatchNorm)]
    momenta = [m.momentum for m in norms]
    model.train()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
    with torch.no_grad():
        for x, _ in data:
            model(x)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    return model


def _measured(problem: Problem) -> dict[str, Any]:
    return diagnose(problem, only=ONLY).measures


def _healthy(*, sync: str = "batch", data: Any = _labelled, lr: float = 0.01) -> Problem:
    sets = [data(seed=seed) for seed in (0, 1)]
    made = SyncBatchNorm if sync == "batch" else nn.BatchNorm2d
    model = _with_statistics_of(cases.network(made), sets)
    return cases.problem_of(model, sets, PARTS, pooled=sync == "batch", lr=lr)


def _sharded_labels() -> Problem:
    return _healthy(sync="none", data=_sorted)


def _small_momentum() -> Problem:
    """The weights have moved on, the running statistics have not followed."""
    problem = _healthy()
    with torch.no_grad():
        problem.model[0].weight.mul_(-3)
        problem.model[1].momentum = problem.model[4].momentum = 1e-3
    return problem


def _statistics_of_one_worker() -> Problem:
    """Local layers, evaluated by the first worker's running statistics, which saw dark images."""

    def data(seed: int) -> tuple[Tensor, Tensor]:
        x, y = _labelled(seed=seed)
        x[:16] -= 3
        return x, y

    sets = [data(seed) for seed in (0, 1)]
    model = _with_statistics_of(cases.network(nn.BatchNorm2d), sets)
    with torch.no_grad():
        model[7].weight.mul_(10)
        # The model has learnt these labels.
        sets = [(x, model.eval()(x).argmax(1)) for x, _ in sets]
    _with_statistics_of(model, [(x[:16], y) for x, y in sets])
    return cases.problem_of(model, sets, PARTS, pooled=False, lr=1e-6)


def _dropout() -> Problem:
    sets = [_labelled(seed=seed) for seed in (0, 1)]
    inner = cases.network()
    model = nn.Sequential(*inner[:3], nn.Dropout(0.5), *inner[3:])
    return cases.problem_of(_with_statistics_of(model, sets), sets, PARTS, lr=0.01)


def _dead_channels() -> Problem:
    problem = _healthy()
    with torch.no_grad():
        problem.model[0].weight[:2] = 0
    return problem


def _exploding() -> Problem:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for width in (16, *[32] * 7):
        linear = nn.Linear(width, 32)
        nn.init.normal_(linear.weight, std=5 / width**0.5)
        layers += [linear, nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(32, 3)).double()
    return cases.problem_of(model, [cases.samples(64)], PARTS, pooled=False, lr=1e-9)


def _large_rate() -> Problem:
    return _healthy(lr=30.0)


def _frozen() -> Problem:
    """A pretrained model whose first norm is frozen, on data that are brighter."""
    sets = [_labelled(seed=seed) for seed in (0, 1)]
    model = _with_statistics_of(cases.network(), sets)
    brighter = [(x + 10, y) for x, y in sets]
    return cases.problem_of(model, brighter, PARTS, lr=1e-4, frozen=("1",))


def _two_samples() -> Problem:
    sets = [_labelled(8, seed) for seed in (0, 1)]
    model = _with_statistics_of(cases.network(nn.BatchNorm2d), sets)
    return cases.problem_of(model, sets, (2, 2, 2, 2), pooled=False, lr=0.01)


def _odd_worker() -> Problem:
    """The third worker reads images that nobody has standardised."""

    def data(seed: int) -> tuple[Tensor, Tensor]:
        x, y = _labelled(seed=seed)
        x[32:48] = x[32:48] * 2 + 20
        return x, y

    return _healthy(data=data)


class Detached(nn.BatchNorm2d):
    """A batch norm whose gradient leaves out that the statistics depend on the batch."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        mean, var = input.detach().mean((0, 2, 3)), input.detach().var((0, 2, 3), correction=0)
        return F.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)


def _wrong_gradient() -> Problem:
    sets = [_labelled(seed=seed) for seed in (0, 1)]
    model = cases.network(Detached)
    _with_statistics_of(sound := cases.network(nn.BatchNorm2d), sets)
    model.load_state_dict(sound.state_dict())
    return cases.problem_of(model, sets, PARTS, pooled=False, lr=1e-4)


def _spoilt(name: str) -> Problem:
    """A number is NaN."""
    problem = _healthy()
    with torch.no_grad():
        problem.model.state_dict()[name].view(-1)[0] = torch.nan
    return problem


SITUATIONS: dict[str, tuple[Callable[[], Problem], set[str], str]] = {
    "sharded labels": (_sharded_labels, {"between workers"}, r"% of 1's variance.*pool it"),
    "small momentum": (
        _small_momentum,
        {"running statistics"},
        r"1's are .* standard deviations off.*evaluation has a loss.*momentum than 0\.001",
    ),
    "statistics of one worker": (
        _statistics_of_one_worker,
        {"running statistics"},
        r"or pool them \(norm.sync: running, or batch\): each worker's follow its own",
    ),
    "dropout": (_dropout, {"dropout"}, r"in front of 5 1\.\d\d times as large"),
    "dead channels": (_dead_channels, {"dead channels"}, r"^50 % of the channels in front of 1 "),
    "exploding": (_exploding, {"gradient by depth"}, r"grows towards the input.*9 layers.*normal"),
    "large rate": (_large_rate, {"learning rate"}, r"raises the loss.*lower train.lr \(2 / "),
    "frozen": (_frozen, {"frozen statistics"}, r"^1 is frozen.*standard deviations"),
    "two samples": (_two_samples, {"few samples"}, r"over 2 samples: too few"),
    "odd worker": (_odd_worker, {"odd worker"}, r"^worker 2's data differ.*in front of 1"),
    "wrong gradient": (
        _wrong_gradient,
        {"invariance"},
        r"^0 is followed by a normalisation.*their cosine is 0\.\d+",
    ),
    "a weight is NaN": (lambda: _spoilt("0.weight"), {"not finite"}, "^the loss is NaN or inf"),
    "running statistics are NaN": (
        lambda: _spoilt("4.running_var"),
        {"running statistics"},
        r"a loss of NaN or infinity by the running statistics, and of \d.* by the data's",
    ),
}


# What follows from the same cause.
ALLOWED = {"dead channels": {"running statistics"}}


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_planted_situation_gets_its_advice_and_no_other(name):
    make, rules, pattern = SITUATIONS[name]
    found = advise(_measured(make()))
    assert {each.rule for each in found} - ALLOWED.get(name, set()) == rules, found
    (text,) = (each.text for each in found if each.rule in rules)
    assert re.search(pattern, text), text


@pytest.mark.parametrize(
    "make",
    [
        _healthy,
        # The layers pool: that the workers differ does no harm.
        lambda: _healthy(data=_sorted),
        lambda: _healthy(sync="none"),
    ],
    ids=["pooled", "pooled sharded labels", "local"],
)
def test_nothing_is_said_of_what_is_well(make):
    assert advise(_measured(make())) == []


def test_running_statistics_that_lag_without_harm_are_passed_over():
    problem = _healthy()
    with torch.no_grad():
        problem.model[7].weight.mul_(0)
        problem.model[1].running_mean += 5
    assert not [each for each in advise(_measured(problem)) if each.rule == "running statistics"]


def test_every_rule_has_its_situation():
    assert {rule for _, rules, _ in SITUATIONS.values() for rule in rules} == RULES.keys()


def test_what_is_not_finite_is_no_figure():
    """Not 0, which would be a loss without any curvature."""
    found = _measured(_spoilt("0.weight"))["smoothness"]
    assert found["smoothness"] is None
    assert found["loss_range"] == found["predictiveness"] == [None, None]


def test_no_measure_no_advice():
    assert advise({}) == []
