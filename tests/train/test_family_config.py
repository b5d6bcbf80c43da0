"""Methods of the family from a configuration: what comes from the network, what from the keys."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from syncnorm import prepare_ddp
from syncnorm.errors import ConfigError
from syncnorm.family import L1BatchNorm, OnlineNorm, PowerNorm
from syncnorm.train import buffers
from syncnorm.train.config.norm import NormSection
from syncnorm.train.norm import apply_rules, fit_layers, make_norm_layer


def network() -> nn.Sequential:
    model = nn.Sequential(nn.BatchNorm2d(4, eps=1e-3, momentum=0.01))
    model(torch.randn(5, 4, 2, 2))
    return model


@pytest.mark.parametrize(
    ("keys", "eps", "momentum"),
    [
        ({}, 1e-3, 0.01),
        ({"eps": 1e-4, "momentum": 0.2}, 1e-4, 0.2),
        ({"options": {"eps": 1e-5, "momentum": None}}, 1e-5, None),
    ],
)
def test_a_network_keeps_its_eps_and_momentum_unless_the_keys_say_others(keys, eps, momentum):
    model = network()
    weight = model[0].weight
    fit_layers(model, NormSection(name="l1_batch_norm", **keys), 100)
    layer = model[0]
    assert isinstance(layer, L1BatchNorm)
    assert (layer.eps, layer.momentum) == (eps, momentum)
    assert layer.weight is weight
    assert int(layer.num_batches_tracked) == 0, "the method's own clock begins"


def test_a_shared_layer_is_replaced_under_all_its_names():
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    fit_layers(model, NormSection(name="l1_batch_norm"), 100)
    assert model[0] is model[2]
    assert isinstance(model[0], L1BatchNorm)


def test_hooks_are_refused():
    model = network()
    model[0].register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ConfigError, match=r"norm.name power_norm fits: .* has hooks"):
        fit_layers(model, NormSection(name="power_norm"), 100)


def test_a_rule_keeps_eps_and_momentum_of_a_network_and_frees_what_was_frozen():
    model = network()
    rules = {"0": "power_norm"}
    apply_rules(model, NormSection(name="batch_norm", rules=rules), 100)
    assert isinstance(model[0], PowerNorm)
    assert (model[0].eps, model[0].momentum) == (1e-3, 0.01)
    section = NormSection(name="frozen", rules=rules)
    model = nn.Sequential(make_norm_layer(section, 100)(4))
    apply_rules(model, section, 100)
    assert isinstance(model[0], PowerNorm)
    assert model[0].training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"options": {"affine": False}}, "options must leave out affine with name l1_batch_norm"),
        ({"options": {"sync": "none", "device": "meta"}}, "options must leave out device, sync"),
        ({"options": {"eps": -1}}, "options must be arguments of l1_batch_norm, got {'eps': -1}"),
        (
            {"name": "power_norm", "options": {"warmpu": 3}},
            "options must be some of eps, momentum, gradient_momentum, warmup, scaling_groups with "
            "name power_norm, got 'warmpu'. The nearest is 'warmup'",
        ),
        (
            {"name": "unified_norm", "options": {"renorm_aftr": 3}},
            "some of eps, momentum, window, warmup, outlier_filtration, renorm_after, lagged with",
        ),
        (
            {"name": "power_norm", "options": {"warmup": "x"}},
            r"options\.warmup must be a valid integer with name power_norm, got 'x'",
        ),
        ({"options": {"momentum": "x"}}, r"options\.momentum must be a valid number with name l1_"),
        (
            {"name": "online_norm", "options": {"guard": "clmap"}},
            r"options\.guard must be 'layer_scaling' or 'clamp' with name online_norm, got 'clmap'",
        ),
        ({"name": "online_norm", "momentum": 1.0}, r"such as online_norm takes, got 1e-05 and 1\."),
        (
            {"name": "batch_norm", "rules": {"0": "online_norm"}, "momentum": 0.0},
            r"such as online_norm takes, got 1e-05 and 0\.0: `momentum` must be in \(0, 1\)",
        ),
    ],
)
def test_what_a_method_does_not_take_is_refused_with_the_configuration(keys, message):
    with pytest.raises(ValidationError, match=message):
        NormSection(**{"name": "l1_batch_norm", **keys})


def slots() -> tuple[list[str], list[str]]:
    layers = (L1BatchNorm(2), L1BatchNorm(2, sync="none"), OnlineNorm(2), nn.BatchNorm1d(2))
    model = prepare_ddp(nn.Sequential(*layers))
    return sorted(buffers.shared_slots(model)), sorted({n[0] for n in buffers.local_slots(model)})


def test_statistics_that_all_workers_have_are_saved_once(pool):
    assert pool(2).run(slots) == [([], ["1", "2", "3"])] * 2
