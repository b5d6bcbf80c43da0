"""Weight standardization equals its formulas, and comes off again."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from syncnorm.errors import InputError
from syncnorm.family import (
    ScaledWeightStandardization,
    WeightStandardization,
    standardize_weights,
)

# Two outputs of four weights: mean 2.5 and variance 1.25, and all the same.
WEIGHT = torch.tensor([[1.0, 2.0, 3.0, 4.0], [7.0, 7.0, 7.0, 7.0]], dtype=torch.float64)


def test_plain_by_hand():
    got = WeightStandardization(eps=0.25)(WEIGHT.view(2, 1, 2, 2))
    expected = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64) / math.sqrt(1.5)
    torch.testing.assert_close(got.flatten(1), torch.stack([expected, 0 * expected]))


def test_scaled_by_hand():
    parametrization = ScaledWeightStandardization(2, gamma=1.5).double()
    with torch.no_grad():
        parametrization.gain.copy_(torch.tensor([2.0, 3.0]))
    expected = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64) / math.sqrt(4 * 1.25)
    got = parametrization(WEIGHT)
    torch.testing.assert_close(got, torch.stack([1.5 * 2.0 * expected, 0 * expected]))
    # The least of I var is eps: not a sum with it.
    torch.testing.assert_close(
        parametrization(1e-4 * WEIGHT)[0], 3.0 * 1e-4 * (WEIGHT[0] - 2.5) / 1e-2
    )


@pytest.mark.parametrize("scaled", [False, True])
def test_differentiates(scaled):
    own = ScaledWeightStandardization(3).double() if scaled else WeightStandardization()
    weight = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(own, weight)
    assert torch.autograd.gradgradcheck(own, weight)


def test_scaled_keeps_the_variance_behind_a_relu():
    torch.manual_seed(0)
    gamma = math.sqrt(2 / (1 - 1 / math.pi))
    layers = [nn.Conv1d(256, 256, 1, bias=False) for _ in range(6)]
    model = standardize_weights(nn.Sequential(*layers), scaled=True, gamma=gamma)
    x = torch.randn(200, 256, 4)
    for layer in model:
        x = layer(x.relu())
        assert x.var().item() == pytest.approx(1, rel=0.1)
        assert x.mean().item() == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_models_convolutions_train_standardised_and_become_plain_again(scaled):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    untouched = copy.deepcopy(model[3])
    before = model[0].weight.detach().clone()
    x = torch.randn(4, 2, 4, 4)
    own = ScaledWeightStandardization(3) if scaled else WeightStandardization()
    assert standardize_weights(model, scaled) is model
    torch.testing.assert_close(model[0].weight, own(before))
    assert not parametrize.is_parametrized(model[3])
    torch.testing.assert_close(model[3].weight, untouched.weight)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x).square().sum().backward()
    optimizer.step()
    y = model(x)
    other = standardize_weights(
        copy.deepcopy(nn.Sequential(nn.Conv2d(2, 3, 3), *model[1:])), scaled
    )
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), y)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Conv2d
    torch.testing.assert_close(model(x), y)


def test_weights_are_not_standardised_twice():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Conv1d(3, 4, 1))
    standardize_weights(model[1])
    with pytest.raises(InputError, match=r"must have plain weights, got .* at \['1'\]"):
        standardize_weights(model)
    assert not parametrize.is_parametrized(model[0])


def test_a_model_without_a_convolution_is_an_error():
    with pytest.raises(InputError, match="`model` must have a convolution, got Linear without one"):
        standardize_weights(nn.Linear(2, 2))
