"""Baselines without batch statistics equal their formulas."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from syncnorm.errors import InputError
from syncnorm.family.plain import (
    BASELINES,
    ChannelRMSNorm,
    Derf,
    DynamicTanh,
    ScalarBias,
    ScalarScale,
    clip_gradients_adaptively_,
    fixup_,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3), (2, 4, 3, 3), (0, 4, 3, 3)], ids=str)
@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_takes_the_place_of_a_batch_norm(name, shape, dtype):
    if len(shape) == 2 and name == "instance_norm":
        pytest.skip("a channel has no positions")
    layer = BASELINES[name](4, 1e-5)
    x = torch.randn(shape).to(dtype).requires_grad_()
    if isinstance(layer, nn.GroupNorm):  # torch's want parameters in the type of x
        layer.to(dtype)
    y = layer(x)
    assert y.shape == x.shape
    assert y.dtype == dtype
    y.sum().backward()
    names = {n for n, _ in layer.named_parameters()}
    assert name == "none" or "weight" in names


def test_the_norms_of_torch_are_of_what_they_say():
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    whole = nn.functional.layer_norm(x, x.shape[1:])
    torch.testing.assert_close(BASELINES["layer_norm"](4, 1e-5).double()(x), whole)
    instance = nn.functional.instance_norm(x)
    torch.testing.assert_close(BASELINES["instance_norm"](4, 1e-5).double()(x), instance)


@pytest.mark.parametrize(
    ("layer", "function"),
    [
        (DynamicTanh(2), lambda v: math.tanh(0.5 * v)),
        (Derf(2), lambda v: math.erf(0.5 * v + 0.25)),
    ],
    ids=["dynamic_tanh", "derf"],
)
def test_functions_of_elements_by_hand(layer, function):
    layer.double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([2.0, -1.0]))
        layer.bias.copy_(torch.tensor([0.5, 0.0]))
        if isinstance(layer, Derf):
            layer.shift.fill_(0.25)
    x = torch.tensor([[[1.0, -3.0], [0.1, 7.0]]], dtype=torch.float64)
    expected = [
        [2 * function(1.0) + 0.5, 2 * function(-3.0) + 0.5],
        [-function(0.1), -function(7.0)],
    ]
    torch.testing.assert_close(layer(x), torch.tensor([expected], dtype=torch.float64))
    assert torch.autograd.gradcheck(layer, x.requires_grad_())


def test_rms_norm_is_torchs_with_channels_in_front():
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    layer, theirs = ChannelRMSNorm(4).double(), nn.RMSNorm(4, eps=1e-5).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(4))
        theirs.weight.copy_(layer.weight)
    torch.testing.assert_close(layer(x), theirs(x.transpose(1, 2)).transpose(1, 2))


def test_clipping_by_hand():
    # Norms of the outputs' weights: 5, and 0, which counts as eps.
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    weight.grad = torch.tensor([[0.0, 1.0], [3e-4, 4e-4]])
    kept = nn.Parameter(torch.tensor([3.0, 4.0]))
    kept.grad = torch.tensor([0.3, 0.4])
    no_gradient = nn.Parameter(torch.ones(2))
    clip_gradients_adaptively_(iter([weight, kept, no_gradient]), clip=0.1, eps=1e-3)
    torch.testing.assert_close(weight.grad, torch.tensor([[0.0, 0.5], [6e-5, 8e-5]]))
    assert torch.equal(kept.grad, torch.tensor([0.3, 0.4]))
    assert no_gradient.grad is None
    clip_gradients_adaptively_([kept], clip=0.05)
    torch.testing.assert_close(kept.grad, torch.tensor([0.15, 0.2]))


def test_clipping_of_a_gradient_of_zero_leaves_it():
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.zeros(2, 2)
    clip_gradients_adaptively_([weight])
    assert torch.equal(weight.grad, torch.zeros(2, 2))


class Branch(nn.Module):
    """A residual block of the paper's figure 1, right."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = [nn.Linear(width, width, bias=False) for _ in range(2)]
        self.branch = nn.Sequential(
            ScalarBias(), self.layers[0], ScalarBias(), nn.ReLU(), ScalarBias(), self.layers[1],
            ScalarScale(), ScalarBias(),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.branch(x)).relu()


def test_fixup_by_its_rules():
    torch.manual_seed(0)
    width, depth = 400, 16
    blocks = [Branch(width) for _ in range(depth)]
    classifier = nn.Linear(width, 10)
    model = nn.Sequential(*blocks, classifier)
    fixup_([block.layers for block in blocks], classifier)
    first = torch.stack([block.layers[0].weight for block in blocks])
    assert first.std().item() == pytest.approx(math.sqrt(2 / width) * depth**-0.5, rel=0.01)
    x = torch.randn(3, width).relu()
    assert torch.equal(model[:-1](x), x), "each block is its shortcut"
    assert not model(x).any()
    assert not any(p.any() for p in classifier.parameters())


def test_fixup_scales_by_the_length_of_the_branch():
    torch.manual_seed(0)
    branches = [[nn.Conv1d(64, 128, 3) for _ in range(3)] for _ in range(16)]
    fixup_(branches, nn.Linear(2, 2))
    first = torch.stack([branch[1].weight for branch in branches])
    assert first.std().item() == pytest.approx(math.sqrt(2 / (128 * 3)) * 16 ** (-1 / 4), rel=0.01)


def test_fixup_moves_a_network_from_its_start():
    torch.manual_seed(0)
    blocks = [Branch(8) for _ in range(4)]
    model = nn.Sequential(*blocks, nn.Linear(8, 3))
    fixup_([block.layers for block in blocks], model[-1])
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, target = torch.randn(16, 8), torch.randint(3, (16,))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(3))
    assert losses[-1] < 0.8 * losses[0]
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters())]
    assert all(moved)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: fixup_([], nn.Linear(2, 2)),
            "`branches` must hold the residual branches, got none",
        ),
        (lambda: fixup_([[]], nn.Linear(2, 2)), r"`branches` must hold .* got a branch of \[\]"),
        (
            lambda: fixup_([[nn.Linear(2, 2), nn.ReLU()]], nn.Linear(2, 2)),
            r"got a branch of \['Linear', 'ReLU'\]",
        ),
        (lambda: clip_gradients_adaptively_([], clip=0.0), "`clip` must be > 0, got 0.0"),
        (lambda: clip_gradients_adaptively_([], eps=-1.0), "`eps` must be > 0, got -1.0"),
        (lambda: DynamicTanh(3)(torch.ones(2, 4)), "`x` must have num_features = 3 channels"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()
