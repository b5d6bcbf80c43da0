"""Batch-channel norm and estimated batch norm beside torch's layers, and their edges."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from syncnorm import convert, revert
from syncnorm.errors import InputError
from syncnorm.family import (
    BalancedBatchNorm,
    BatchChannelNorm,
    EstimatedBatchNorm,
    MembranePotentialBatchNorm,
)


def batch(step: int, channels: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return 2 * torch.randn(4, channels, 3, 3, generator=generator, dtype=torch.float64) + 1


def test_batch_channel_norm_is_torchs_batch_norm_and_group_norm():
    layer = BatchChannelNorm(6, 3).double()
    theirs = nn.Sequential(nn.BatchNorm2d(6), nn.GroupNorm(3, 6)).double()
    with torch.no_grad():
        layer.group_weight.copy_(torch.tensor([1.5, -0.5, 2.0]))
        layer.group_bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
        theirs[1].weight.copy_(layer.group_weight.repeat_interleave(2))
        theirs[1].bias.copy_(layer.group_bias.repeat_interleave(2))
    for step in range(3):
        torch.testing.assert_close(layer(batch(step)), theirs(batch(step)))
    torch.testing.assert_close(layer.eval()(batch(9)), theirs.eval()(batch(9)))


def test_an_estimated_batch_norm_trains_as_it_evaluates_afterwards():
    layer = EstimatedBatchNorm(6).double()
    for step in range(3):
        y = layer(batch(step))
        assert torch.equal(copy.deepcopy(layer).eval()(batch(step)), y)


def test_estimates_of_a_still_network_become_its_moments():
    layer = EstimatedBatchNorm(6, momentum=0.5).double()
    for _ in range(80):
        layer(batch(0))
    torch.testing.assert_close(layer.running_mean, batch(0).mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, batch(0).var((0, 2, 3), correction=0))


@pytest.mark.parametrize(
    "cls", [EstimatedBatchNorm, MembranePotentialBatchNorm, BalancedBatchNorm, BatchChannelNorm]
)
def test_a_batch_norm_becomes_one_and_evaluates_as_before(cls):
    model = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)).double()
    model(batch(0))
    expected = copy.deepcopy(model).eval()(batch(1))
    convert(model, cls)
    assert isinstance(model[1], cls)
    if cls is BatchChannelNorm:
        with pytest.raises(InputError, match="which no batch norm evaluates as"):
            revert(model)
        return
    torch.testing.assert_close(model.eval()(batch(1)), expected)
    model.train()(batch(2))
    expected = model.eval()(batch(1))
    assert type(revert(model)[1]) is nn.BatchNorm2d
    torch.testing.assert_close(model(batch(1)), expected)


@pytest.mark.parametrize("shape", [(0, 6, 3, 3), (1, 6), (1, 6, 1, 1)], ids=str)
@pytest.mark.parametrize("cls", [EstimatedBatchNorm, MembranePotentialBatchNorm, BatchChannelNorm])
def test_a_single_value_or_none_raises_nothing(cls, shape):
    layer = cls(6, **({"num_groups": 6} if cls is BatchChannelNorm else {}))
    x = torch.ones(shape, requires_grad=True)
    y = layer(x)
    y.backward(torch.ones_like(y))
    assert x.grad.isfinite().all()
    assert y.isfinite().all()
    if cls is not EstimatedBatchNorm:
        assert torch.equal(layer.running_var, torch.ones(6)), "one value says nothing about scale"


@pytest.mark.parametrize(("channels", "groups"), [(6, 2), (64, 32), (48, 16), (7, 1)])
def test_the_number_of_groups_is_a_divisor(channels, groups):
    assert BatchChannelNorm(channels).num_groups == groups


@pytest.mark.parametrize("groups", [4, 0, -1])
def test_bad_groups(groups):
    with pytest.raises(
        InputError, match=f"`num_groups` must divide num_features = 6, got {groups}"
    ):
        BatchChannelNorm(6, groups)


def test_without_affine_there_are_no_parameters():
    assert not [*BatchChannelNorm(6, affine=False).parameters()]
