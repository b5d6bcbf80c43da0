"""Layers of the family in blocks, copies, conversions and without numbers: what must not be lost."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from syncnorm import (
    SyncBatchNorm,
    SyncBatchRenorm,
    accumulate,
    convert,
    frozen_statistics,
    prepare_ddp,
    recalibrate,
)
from syncnorm.comm import exchange
from syncnorm.errors import InputError
from syncnorm.family import (
    MABN,
    METHODS,
    BalancedBatchNorm,
    BatchChannelNorm,
    EstimatedBatchNorm,
    EvoNorm,
    L1BatchNorm,
    MembranePotentialBatchNorm,
    PowerNorm,
    RegionNorm,
)
from syncnorm.model.evaluation import evaluation_statistics
from syncnorm.model.sharpness import SAM

ALL = {
    **METHODS,
    "balanced": BalancedBatchNorm,
    "evonorm": EvoNorm,
    "lagged_mabn": lambda channels: MABN(channels, lagged=True),
    "membrane": MembranePotentialBatchNorm,
}


def batch(seed: int = 0) -> Tensor:
    return torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) + 1


def copied(model: nn.Module) -> list[Any]:
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # noqa: S301


def test_a_copy_made_in_frozen_statistics_is_not_frozen():
    model = nn.Sequential(L1BatchNorm(4))
    with frozen_statistics(model):
        copies = copied(model)
        model(batch())
    for each in copies:
        each(batch())
        assert int(each[0].num_batches_tracked) == 1
    assert int(model[0].num_batches_tracked) == 0


@pytest.mark.parametrize("name", ALL)
def test_a_frozen_forward_moves_nothing_and_gives_what_one_that_moves_gives(name):
    layer = ALL[name](4).double()
    layer(batch(1).double())
    other, x = copy.deepcopy(layer), batch().double()
    before = copy.deepcopy(layer.state_dict())
    with frozen_statistics(layer):
        frozen = layer(x)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    if isinstance(layer, EstimatedBatchNorm):
        # By estimates as they are, which are those of a step's first forward.
        assert torch.equal(frozen, layer.eval()(x))
    else:
        assert torch.equal(frozen, other(x))
        assert torch.equal(frozen, layer(x))
        # The block is over, and nothing of it is left.
        moved = other.state_dict()
        assert all(torch.equal(moved[key], value) for key, value in layer.state_dict().items())
        assert not all(torch.equal(before[key], value) for key, value in moved.items())


@pytest.mark.parametrize("make", [EstimatedBatchNorm, partial(BatchChannelNorm, estimate=True)])
def test_a_second_forward_of_a_step_is_the_first(make):
    """SAM without a perturbation takes the plain step."""
    x, steps = batch().double(), []
    for is_sam in (False, True):
        layer = make(4).double()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

        def closure(layer: nn.Module = layer) -> Tensor:
            loss = (layer(x) ** 3).mean()
            loss.backward()
            return loss

        SAM(optimizer, layer, rho=0.0).step(closure) if is_sam else (closure(), optimizer.step())
        steps.append(layer.state_dict())
    for name, value in steps[0].items():
        torch.testing.assert_close(steps[1][name], value)


@pytest.mark.parametrize("cls", [L1BatchNorm, nn.BatchNorm2d])
def test_a_copy_made_in_evaluation_statistics_is_no_part_of_it(cls):
    model = nn.Sequential(cls(4)).eval()
    with evaluation_statistics(model), evaluation_statistics(model):
        copies = copied(model)
        inside = model(batch())
    expected = model(batch())
    assert not torch.allclose(inside, expected)
    for each in copies:
        assert torch.equal(each(batch()), expected)
        assert vars(each[0]).keys() == vars(model[0]).keys()
        each.train()(batch())
        if cls is nn.BatchNorm2d:
            convert(each)  # its forward is torch's again


def test_evaluation_statistics_have_the_weights_of_a_mask():
    """As those of the layer's training, and of the part of the batch that counts alone."""
    layer = PowerNorm(4, affine=False, scaling_groups=0).eval()
    x, mask = batch(), torch.zeros(6, 1, 1, 1)
    mask[:4] = 1
    x[4:] *= 100
    with evaluation_statistics(layer):
        got, expected = layer(x, mask), layer(x[:4])
        assert not torch.allclose(layer(x)[:4], expected)
    torch.testing.assert_close(got[:4], expected)


class Unknown(L1BatchNorm):
    batch_statistics = property()  # pyright: ignore[reportAssignmentType]


def test_a_method_without_batch_statistics_is_named():
    with (
        pytest.raises(InputError, match=r"method `batch_statistics`.*got '0' \(Unknown\)"),
        evaluation_statistics(nn.Sequential(Unknown(4)).eval()),
    ):
        pass


def test_convert_checks_options_by_each_layers_channels_before_anything_changes():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(6))
    with pytest.raises(InputError, match=r"'1' breaks a rule: `scaling_groups` must divide .* = 6"):
        convert(model, PowerNorm, scaling_groups=4)
    assert [type(m) for m in model] == [nn.BatchNorm2d] * 2
    assert [m.scaling_groups for m in convert(model, PowerNorm, scaling_groups=2)] == [2, 2]


def test_convert_keeps_parameters_frozen():
    layer = nn.BatchNorm2d(4).requires_grad_(False)
    new = convert(layer, BatchChannelNorm)
    assert len([*new.parameters()]) == 4
    assert not any(p.requires_grad for p in new.parameters())
    assert all(p.requires_grad for p in convert(nn.BatchNorm2d(4), BatchChannelNorm).parameters())


def test_convert_takes_no_default_of_renormalisation():
    assert convert(SyncBatchRenorm(4), L1BatchNorm).momentum == 0.1
    assert convert(SyncBatchRenorm(4, momentum=0.1), PowerNorm).momentum == 0.1


@pytest.mark.parametrize(
    "hook",
    [
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
        "register_load_state_dict_post_hook",
        "register_load_state_dict_pre_hook",
        "register_state_dict_post_hook",
        "register_state_dict_pre_hook",
    ],
)
def test_convert_refuses_every_hook(hook):
    layer = nn.BatchNorm2d(4)
    getattr(layer, hook)(lambda *_: None)
    with pytest.raises(InputError, match="has hooks, which a new layer does not have"):
        convert(layer, L1BatchNorm)


def test_recalibrate_says_what_it_leaves_alone():
    model = nn.Sequential(SyncBatchNorm(4), L1BatchNorm(4))
    before = copy.deepcopy(model[1].state_dict())
    with pytest.warns(UserWarning, match=r"recalibrate leaves .*'1' \(L1BatchNorm\)") as caught:
        recalibrate(model, [batch()])
    assert caught[0].filename == __file__
    assert all(torch.equal(before[key], value) for key, value in model[1].state_dict().items())
    with pytest.raises(InputError, match="must have a BatchNorm layer"):
        recalibrate(nn.Sequential(L1BatchNorm(4)), [batch()])


def test_accumulate_says_what_follows_every_forward():
    model = nn.Sequential(SyncBatchNorm(4), L1BatchNorm(4))
    said = pytest.warns(UserWarning, match=r"accumulate leaves out .*'1' \(L1BatchNorm\)")
    with said as caught, accumulate(model):
        for seed in range(3):
            model(batch(seed))
    assert caught[0].filename == __file__
    assert [int(m.num_batches_tracked) for m in model] == [1, 3]
    with (
        pytest.raises(InputError, match=r"for accumulate, got only '0' \(L1BatchNorm\)"),
        accumulate(nn.Sequential(L1BatchNorm(4))),
    ):
        pass


@pytest.mark.parametrize("name", ALL)
def test_layers_without_numbers_train(name):
    with torch.device("meta"):
        layer, x = ALL[name](4), torch.randn(6, 4, 3, 3, requires_grad=True)
        for _ in range(2):
            layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.is_meta
    with FakeTensorMode():
        layer, x = ALL[name](4), torch.randn(6, 4, 3, 3, requires_grad=True)
        for _ in range(2):
            layer(x).sum().backward()
        assert layer.eval()(x).shape == x.shape


def exchanges_without_numbers() -> int:
    with exchange.record() as exchanges, torch.device("meta"):
        for cls in ALL.values():
            layer = cls(4)
            layer(torch.randn(6, 4, 3, 3, requires_grad=True)).sum().backward()
    return len(exchanges)


def test_layers_without_numbers_exchange_nothing(pool):
    assert pool(2).run(exchanges_without_numbers) == [0, 0]


@pytest.mark.parametrize("name", METHODS)
def test_a_model_on_the_meta_device_is_converted_and_filled(name):
    with torch.device("meta"):
        model = nn.Sequential(nn.BatchNorm2d(4))
    convert(model, METHODS[name]).to_empty(device="cpu")
    model[0].reset_parameters()
    assert same(model[0], METHODS[name](4))


@pytest.mark.parametrize("name", ALL)
def test_reset_parameters_begins_anew(name):
    layer = ALL[name](4)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(7)
    layer.reset_parameters()
    assert same(layer, ALL[name](4))
    for seed in range(3):
        layer(batch(seed)).square().sum().backward()
    layer.reset_running_stats()
    assert same(layer, ALL[name](4))


def same(layer: nn.Module, other: nn.Module) -> bool:
    states = layer.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    return all(torch.equal(states[0][key], value) for key, value in states[1].items())


def test_evonorm_refuses_an_input_without_positions_before_it_exchanges_or_counts():
    layer = EvoNorm(4)
    with exchange.record() as exchanges, pytest.raises(InputError, match=r"got shape \(6, 4\)"):
        layer(torch.randn(6, 4))
    assert not exchanges
    assert int(layer.num_batches_tracked) == 0


def test_region_norm_has_a_type_a_device_and_a_description():
    layer = RegionNorm(4, eps=1e-3, dtype=torch.float64, device="meta", sync="none")
    assert (layer.weight.dtype, layer.weight.device.type) == (torch.float64, "meta")
    assert repr(layer) == "RegionNorm(4, eps=0.001, affine=True, sync='none')"
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert same(layer, RegionNorm(4, dtype=torch.float64))


def other_region_norms(rank_features: int) -> str:
    try:
        prepare_ddp(nn.Sequential(RegionNorm(rank_features)))
    except Exception as error:
        return str(error)
    return "nothing was raised"


def test_workers_with_other_region_norms_are_told(pool):
    for said in pool(2).run_each(other_region_norms, [(3,), (4,)]):
        assert "must have the same layers" in said


def test_sam_moves_a_shared_parameter_once():
    first, second = SyncBatchNorm(4), SyncBatchNorm(4)
    second.weight, second.bias = first.weight, first.bias
    model = nn.Sequential(first, nn.Linear(4, 4), second)
    start, seen = torch.cat([first.weight, first.bias]).detach(), []

    def closure() -> Tensor:
        seen.append(torch.cat([first.weight, first.bias]).detach())
        loss = model(batch()[:, :, 0, 0]).pow(3).sum()
        loss.backward()
        return loss

    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.0), model, rho=1.0)
    sam.step(closure)
    assert len(sam.parameters) == 2
    assert (seen[1] - start).norm() == pytest.approx(1.0)
    assert torch.equal(torch.cat([first.weight, first.bias]), start)
