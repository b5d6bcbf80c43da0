"""Weight matching finds the order of channels, and permuting leaves a network's function alone."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncnorm import SyncBatchNorm
from syncnorm.errors import InputError
from syncnorm.family import MABN, BalancedBatchNorm, EvoNorm, L1BatchNorm, PowerNorm, tasks_of
from syncnorm.merge import chain_of_merges, interpolate, match_weights
from syncnorm.merge import channels as channels_module
from syncnorm.merge.channels import channels
from syncnorm.merge.match import permute
from syncnorm.train.models import BasicBlock, Bottleneck, ResNet

IMAGES = (3, 2, 8, 8)


class Block(nn.Module):
    """A residual block as torchvision writes it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Views(nn.Module):
    """A flattening view, a layer that is called twice, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, 2)
        self.again = nn.Conv2d(5, 5, 3, padding=1)
        self.gate = nn.Conv2d(2, 5, 3, 2)
        self.fc = nn.Linear(45, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x)) * torch.sigmoid(self.gate(x))
        y = self.again(F.gelu(self.again(y)) + 1.0)
        return F.log_softmax(self.fc(y.view(x.size(0), -1)), dim=1)


def _resnet(block: type, norm) -> ResNet:
    return ResNet(block, (2, 1), (5, 6), "cifar", in_channels=2, num_classes=4, norm_layer=norm)


NETWORKS = {
    "mlp": lambda: nn.Sequential(
        *(nn.Flatten(), nn.Linear(128, 7), nn.LayerNorm(7), nn.ReLU()),
        *(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(), nn.Linear(6, 4)),
    ),
    "flattened maps": lambda: nn.Sequential(
        *(nn.Conv2d(2, 5, 3), nn.GroupNorm(1, 5), nn.PReLU(5), nn.MaxPool2d(2)),
        *(nn.Conv2d(5, 5, 3, padding=1, groups=5), nn.InstanceNorm2d(5, affine=True), nn.SiLU()),
        *(nn.ConvTranspose2d(5, 6, 2), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(96)),
        nn.Linear(96, 4),
    ),
    "views": Views,
    "torchvision's block": lambda: nn.Sequential(
        *(nn.Conv2d(2, 5, 3), Block(5, 6), Block(6, 6), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(1), nn.Linear(6, 4)),
    ),
    "basic blocks": lambda: _resnet(BasicBlock, SyncBatchNorm),
    "lagged": lambda: _resnet(BasicBlock, lambda c: SyncBatchNorm(c, sync="lagged")),
    "the family's layers": lambda: nn.Sequential(
        *(nn.Conv2d(2, 5, 3), EvoNorm(5), nn.Conv2d(5, 6, 3), L1BatchNorm(6), nn.ReLU()),
        *(nn.Conv2d(6, 5, 2), MABN(5), nn.ReLU(), nn.Conv2d(5, 6, 1), PowerNorm(6), nn.ReLU()),
        *(Mean((-1, -2)), nn.Linear(6, 4)),
    ),
    "bottlenecks": lambda: _resnet(Bottleneck, nn.BatchNorm2d),
}


def _network(name: str, seed: int = 0) -> nn.Module:
    """In evaluation, with statistics and parameters that are no channel's default."""
    torch.manual_seed(seed)
    model = NETWORKS[name]().double().eval()
    buffers = dict(model.named_buffers())
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and (tensor.ndim == 1 or key in buffers):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
        elif tensor.is_floating_point():
            tensor.mul_(2.0)
    return model


def _shuffled(model: nn.Module, seed: int = 1) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    sets = channels(model)
    return permute(model, sets, [torch.randperm(each.size, generator=g) for each in sets])


def _images() -> Tensor:
    return torch.randn(IMAGES, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_permuted_network_computes_the_same(name):
    model = _network(name)
    shuffled = _shuffled(model)
    assert (shuffled(_images()) - model(_images())).abs().max() < 1e-10
    sets = channels(model)
    assert sets
    state, other = model.state_dict(), shuffled.state_dict()
    moved = {place.tensor for each in sets for place in each.places}
    assert {k for k in state if not torch.equal(state[k], other[k])} == moved


@pytest.mark.parametrize("name", NETWORKS)
def test_a_permuted_copy_is_matched_exactly(name):
    model = _network(name)
    shuffled = _shuffled(model)
    before = copy.deepcopy(shuffled.state_dict())
    matched = match_weights(model, shuffled).state_dict()
    assert all(torch.equal(value, matched[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in shuffled.state_dict().items())


def _without(is_left_out):
    """A reader that overlooks some places."""
    put = channels_module._Reader.put

    def overlooking(self, node, x, tensor, axis, length):
        if not is_left_out(self.names[id(tensor)], axis):
            put(self, node, x, tensor, axis, length)

    return overlooking


@pytest.mark.parametrize(
    "is_left_out",
    [
        lambda name, axis: "running_mean" in name,
        lambda name, axis: "running_var" in name,
        lambda name, axis: name.endswith("bn1.bias"),
        lambda name, axis: "conv2" in name and axis == 1,
        lambda name, axis: "downsample" in name and axis == 0,
        lambda name, axis: name == "fc.weight",
    ],
    ids=["mean", "var", "bias", "inputs", "shortcut", "output"],
)
def test_whatever_is_not_permuted_changes_the_function(monkeypatch, is_left_out):
    model = _network("basic blocks")
    monkeypatch.setattr(channels_module._Reader, "put", _without(is_left_out))
    assert (_shuffled(model)(_images()) - model(_images())).abs().max() > 1e-3


def test_sums_that_are_not_one_set_change_the_function(monkeypatch):
    model = _network("basic blocks")
    monkeypatch.setattr(channels_module._Reader, "join", lambda *_: None)
    assert (_shuffled(model)(_images()) - model(_images())).abs().max() > 1e-3


def _agreement(a: nn.Module, b: nn.Module) -> float:
    return sum((p * q).sum().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_what_is_not_by_channel_stays_however_many_there_are():
    """Here as many tasks as channels."""
    nets = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        nets.append(
            nn.Sequential(nn.Linear(3, 4), BalancedBatchNorm(4, num_tasks=4), nn.Linear(4, 2))
        )
    first, second = nets
    with torch.no_grad():
        second[1].psi.copy_(torch.arange(4.0))
    matched, x, tasks = match_weights(first, second), torch.randn(8, 3), torch.arange(8) % 4
    assert not torch.equal(matched[0].weight, second[0].weight), "some order is better"
    with tasks_of(second, tasks), tasks_of(matched, tasks):
        torch.testing.assert_close(matched(x), second(x))


def test_one_hidden_layer_gets_the_best_of_all_orders():
    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()

    a, b = network(0), network(1)
    sets = channels(b)
    best = max(
        _agreement(a, permute(b, sets, [torch.tensor(order)]))
        for order in itertools.permutations(range(5))
    )
    assert _agreement(a, match_weights(a, b)) == pytest.approx(best, rel=1e-12)
    assert _agreement(a, b) < best - 0.1


@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks_agree_better_once_matched(name):
    a, b = _network(name), _network(name, seed=3)
    matched = match_weights(a, b)
    assert _agreement(a, matched) > _agreement(a, b) + 1e-3
    assert (matched(_images()) - b(_images())).abs().max() < 1e-10
    again = match_weights(a, matched)
    assert _agreement(a, again) >= _agreement(a, matched) * (1 - 1e-9)


class Transposing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Mean(nn.Module):
    def __init__(self, axis: int | tuple[int, ...]) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.axis)


class Flattening(nn.Module):
    """A view of what `first` gives, and -1."""

    def __init__(self, first: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(self.first(x), -1)


@pytest.mark.parametrize(
    "first",
    [lambda x: x.size(0), lambda x: x.size(dim=0), lambda x: x.shape[0], lambda x: x.size()[0]],
    ids="abcd",
)
def test_a_view_of_the_number_of_samples_flattens(first):
    torch.manual_seed(0)
    a, b = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Flattening(first), nn.Linear(64, 2))
        for _ in range(2)
    )
    x = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(match_weights(a, b)(x), b(x))


class Auxiliary(nn.Module):
    """Two modes, each with a classifier of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(2, 6, 3), SyncBatchNorm(6), nn.ReLU())
        self.in_training, self.in_evaluation = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x).mean((2, 3))
        return self.in_training(x) if self.training else self.in_evaluation(x)


@pytest.mark.parametrize("is_training", [False, True])
def test_what_one_mode_alone_computes_stays_the_same(is_training):
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(Auxiliary().double().train(is_training))
    a, b = networks
    matched = match_weights(a, b)
    assert matched.training == b.training == is_training
    assert not torch.equal(matched.trunk[0].weight, b.trunk[0].weight), "some order is better"
    for mode in (False, True):
        expected = copy.deepcopy(b).train(mode)(_images())
        assert (copy.deepcopy(matched).train(mode)(_images()) - expected).abs().max() < 1e-10


def test_what_one_mode_alone_computes_is_refused_where_it_is_not_understood():
    model = Auxiliary().eval()
    model.in_training = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Flatten(), nn.Linear(6, 4))
    with pytest.raises(InputError, match="got a layer of Unflatten at"):
        match_weights(model, model)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Conv2d(4, 4, 1), Transposing()], "got an operation transpose at"),
        ([nn.Conv2d(4, 4, 1, groups=2)], "got a convolution of 2 groups at"),
        ([nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)], "got a layer of GroupNorm of 2 groups at"),
        (
            [nn.Conv2d(4, 4, 1), PowerNorm(4, scaling_groups=2)],
            "got a layer of PowerNorm of 2 groups at",
        ),
        ([nn.Linear(4, 4), nn.MaxPool1d(2)], "got a layer of MaxPool1d at"),
        ([nn.Linear(4, 4), nn.Conv1d(4, 4, 1)], "got a convolution of what is no map at"),
        ([nn.Conv1d(4, 4, 1), Mean(-2)], "got an operation mean at"),
        *(
            ([nn.Conv2d(4, 4, 1), Flattening(first), nn.Linear(16, 4)], "got an operation reshape")
            for first in (
                lambda x: x.size(0) * x.size(1),
                lambda x: x.size(1),
                lambda x: x.shape[-1],
                lambda x: x.dim(),
            )
        ),
        ([nn.Conv2d(4, 4, 1), nn.LSTM(4, 4)], "got a layer of LSTM at"),
        ([nn.Conv2d(4, 4, 1), nn.Linear(4, 4)], "of maps that were not flattened at"),
        ([nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(6, 4)], "got 6 features of 4 channels at"),
        ([Branching()], r"must be traceable by torch.fx, got Sequential: "),
        (
            [nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))],
            "got a parameter that no layer of torch.nn holds|computed from something else",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_what_is_not_understood_is_refused(layers, message):
    model = nn.Sequential(*layers)
    with pytest.raises(InputError, match=message):
        match_weights(model, model)


def test_a_part_that_can_be_traced_is_matched_within_a_network_that_cannot():
    name = next(iter(NETWORKS))
    model = nn.Sequential(_network(name), Branching())
    shuffled = copy.deepcopy(model)
    shuffled[0] = _shuffled(model[0])
    shuffled[0] = match_weights(model[0], shuffled[0])
    state = shuffled.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(shuffled(_images()), model(_images()))


def test_other_architectures_and_a_missing_package(monkeypatch):
    small, large = nn.Linear(3, 2), nn.Linear(3, 4)
    with pytest.raises(InputError, match=r"got 'bias' with shapes \(2,\) and \(4,\), and 1 other"):
        match_weights(small, large)
    with pytest.raises(InputError, match=r"got 'bias' with shapes \(2,\) and None"):
        interpolate(small, nn.Linear(3, 2, bias=False))
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(InputError, match=r"needs scipy.*pip install 'syncnorm\[merge\]'"):
        match_weights(_network("mlp"), _network("mlp"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    networks = [_network("mlp"), _network("mlp")]
    for number, name in enumerate("ab"):
        with torch.no_grad():
            networks[number][4].weight[1, 2] = value
        with pytest.raises(InputError, match=f"`{name}` must have finite weights.* in '4.weight'"):
            match_weights(*networks)
        networks[0] = _network("mlp")


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_interpolation(alpha):
    a, b = _network("basic blocks"), _network("basic blocks", seed=3)
    a.bn1.num_batches_tracked.fill_(7)
    mixed = interpolate(a, b, alpha).state_dict()
    for name, value in a.state_dict().items():
        if value.is_floating_point():
            value = (1 - alpha) * value + alpha * b.state_dict()[name]
        torch.testing.assert_close(mixed[name], value, rtol=1e-14, atol=1e-14)


class _WithExtraState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"number": self.number}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.number = state["number"]


def test_what_modules_keep_besides_tensors_is_that_of_the_first():
    a, b = _WithExtraState(3, 2), _WithExtraState(3, 2)
    a.number, b.number = 1, 2
    batches = [[torch.randn(5, 3)], [torch.randn(5, 3)]]
    for merged in (interpolate(a, b), chain_of_merges([a, b], batches)):
        assert merged.get_extra_state() == {"number": 1}


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_shares_out_of_range(alpha):
    with pytest.raises(InputError, match=rf"`alpha` must be in \[0, 1\], got {alpha}"):
        interpolate(nn.Linear(1, 1), nn.Linear(1, 1), alpha)
