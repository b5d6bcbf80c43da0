"""Optimizers and schedules by name."""

import pytest
import torch

from syncnorm.errors import ConfigError
from syncnorm.train import optim


def rates(name, warmup=0.0, steps=12, **options):
    optimizer = optim.make_optimizer(
        "SGD", torch.nn.Linear(1, 1).parameters(), 1.0, {"momentum": 0.9}
    )
    schedule = optim.make_schedule(name, optimizer, warmup, steps, options)
    found = []
    for _ in range(steps + 1):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_cosine_rises_then_falls():
    found = rates("cosine", warmup=1 / 3)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[8] == pytest.approx(0.5)
    assert found[12] == pytest.approx(0.0)
    assert found[4:] == sorted(found[4:], reverse=True)


def test_linear_and_constant():
    assert rates("linear", warmup=1 / 6, steps=12) == pytest.approx(
        [0.5, 1.0, *(1 - i / 10 for i in range(11))]
    )
    assert rates("constant", warmup=1 / 6) == [0.5] + [1.0] * 12


def test_a_class_of_torch_counts_from_the_end_of_the_warm_up():
    assert rates("StepLR", step_size=2, gamma=0.1)[:5] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert rates("StepLR", warmup=1 / 6, step_size=2, gamma=0.1)[:6] == pytest.approx(
        [0.5, 1.0, 1, 1, 0.1, 0.1]
    )


def test_without_warm_up_and_of_a_single_step():
    assert rates("cosine", steps=1)[0] == 1.0


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_every_optimizer_takes_a_step(name):
    model = torch.nn.Linear(3, 2, bias=False)
    optimizer = optim.make_optimizer(name, model.parameters(), 0.1, {})
    before = model.weight.clone()
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_lists_become_tuples_and_frozen_parameters_are_left_out():
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    optimizer = optim.make_optimizer("Adam", model.parameters(), 0.1, {"betas": [0.8, 0.9]})
    (group,) = optimizer.param_groups
    assert group["betas"] == (0.8, 0.9)
    assert group["params"] == [model.weight]


@pytest.mark.parametrize(
    ("check", "name", "options", "message"),
    [
        (
            optim.check_optimizer,
            "SGD",
            {"momentumm": 0.9},
            "momentumm\n *Extra inputs are not permitted",
        ),
        (optim.check_optimizer, "SGD", {"lr": 0.9}, "lr\n *Extra inputs are not permitted"),
        (
            optim.check_optimizer,
            "Adam",
            {"betas": [0.9, 1.5]},
            r"Adam refuses .* Invalid beta parameter at index 1: 1.5",
        ),
        (
            optim.check_optimizer,
            "SGD",
            {"momentum": "much"},
            "momentum\n *Input should be a valid number",
        ),
        (optim.check_schedule, "cosine", {"T_max": 3}, "T_max\n *Extra inputs are not permitted"),
        (optim.check_schedule, "StepLR", {}, "step_size\n *Field required"),
        (optim.check_schedule, "StepLR", {"step_size": 0}, "StepLR refuses {'step_size': 0}"),
    ],
)
def test_arguments_are_checked(check, name, options, message):
    with pytest.raises(ValueError, match=message):
        check(name, options)


@pytest.mark.parametrize(
    ("check", "name", "hint"),
    [
        (optim.check_optimizer_name, "Adan", " The nearest is 'Adam'."),
        # Not a slip of the pen: it is not offered.
        (optim.check_optimizer_name, "LBFGS", ""),
        (optim.check_schedule_name, "cosin", " The nearest is 'cosine'."),
    ],
)
def test_names_are_checked(check, name, hint):
    with pytest.raises(ValueError, match=f"must be one of .* got {name!r}.{hint}$"):
        check(name)


@pytest.mark.parametrize("name", sorted(optim._SAME_TOGETHER))
def test_parameters_that_are_taken_at_once_get_the_same_bits(name):
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1} if name == "SGD" else {}
    results = []
    for more in ({}, {"foreach": False}):
        generator = torch.Generator().manual_seed(0)
        parameters = [
            torch.randn(shape, generator=generator).requires_grad_()
            for shape in ((7, 5), (33,), ())
        ]
        optimizer = optim.make_optimizer(name, parameters, 0.1, options | more)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        assert optimizer.param_groups[0]["foreach"] is (not more)
        results.append(parameters)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("name", "options", "warmup", "words"),
    [
        ("PolynomialLR", {"total_iters": 0}, 0.3, "4 of them warm-up.*ZeroDivisionError"),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 5}, 0.0, "it has 5 steps"),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 7}, 0.3, "it has 7 steps"),
    ],
)
def test_a_schedule_that_ends_before_the_run_is_refused_at_its_beginning(
    name, options, warmup, words
):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    with pytest.raises(ConfigError, match=rf"`train.schedule` must last for 12 .*{words}"):
        optim.make_schedule(name, optimizer, warmup, 12, options)
    assert optimizer.param_groups[0]["lr"] == 0.1
    if name == "OneCycleLR":
        steps = 12 - round(12 * warmup)
        optim.make_schedule(name, optimizer, warmup, 12, {**options, "total_steps": steps})
