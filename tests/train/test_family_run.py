"""Runs whose layers are methods of the family."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm.errors import ConfigError
from syncnorm.family import METHODS, L1BatchNorm
from syncnorm.family.plain import BASELINES
from syncnorm.train.config.norm import NormSection
from syncnorm.train.finished.export import plain_network
from syncnorm.train.finished.load import load
from syncnorm.train.norm import apply_rules, fit_layers, make_norm_layer
from tests.train import nets, runs
from tests.train.test_loop import FEW, RAGGED, last, run

WIDE = "model.name=digits_resnet"


# So that a run gets past the steps in which a batch's own statistics are used.
_WINDOW = ["norm.options.window=2", "norm.options.warmup=3", "norm.options.renorm_after=4"]
OPTIONS = {
    "mabn": _WINDOW,
    "power_norm": ["norm.options.warmup=3"],
    "unified_norm": _WINDOW,
}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "online_norm"])
def test_a_run_is_the_same_on_one_worker_and_two(pool, tmp_path, method):
    alone, together = tmp_path / "alone", tmp_path / "together"
    options = [*RAGGED, f"norm.name={method}", *OPTIONS.get(method, [])]
    run(pool, 1, alone, options)
    outcome = run(pool, 2, together, options)[0]
    assert len(set(outcome.digests)) == 1
    for one, many in zip(runs.events(alone, "step"), runs.events(together, "step"), strict=True):
        assert many["loss"] == pytest.approx(one["loss"], rel=1e-11)
    state, expected = last(together).tensors["model"], last(alone).tensors["model"]
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-9)


def test_workers_of_online_norm_agree_at_the_end(pool, tmp_path):
    """Their statistics are of their own samples, and of all workers' once they are averaged."""
    outcome = run(pool, 2, tmp_path / "run", [*RAGGED, WIDE, "norm.name=online_norm"])[0]
    assert len(set(outcome.digests)) == 1
    assert runs.events(tmp_path / "run", "step")[-1]["loss"] < 2.3


# What normalises without batch statistics.
OTHERS = {
    **{name: [f"norm.name={name}"] for name in BASELINES},
    **{
        name: ["norm.name=none", f"norm.weights={name}", "train.adaptive_clip=0.1"]
        for name in (
            "weight_norm",
            "spectral_norm",
            "centred",
            "standardized",
            "scaled_standardized",
        )
    },
}


@pytest.mark.parametrize("kind", OTHERS)
def test_baselines_train_and_their_runs_load(pool, tmp_path, kind):
    options = [FEW, "train.epochs=1", "train.global_batch=79", "norm.sync=none", *OTHERS[kind]]
    folder = tmp_path / "run"
    run(pool, 1, folder, options)
    losses = [event["loss"] for event in runs.events(folder, "step")]
    assert len(losses) == 5
    assert all(torch.tensor(losses).isfinite())
    (folder / "config.yaml").write_text(json.dumps(last(folder).facts["config"]))
    model = load(folder, allow=["tests"])
    assert not any(isinstance(m, _BatchNorm) for m in model.modules())
    plain = plain_network(model)
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(plain(x), model.network(x), rtol=1e-5, atol=1e-5)
    assert not [key for key in plain.state_dict() if "parametrizations" in key]


def test_gradients_are_clipped_by_their_weights(pool, tmp_path):
    """In a step that is far too large, weights move by a thousandth of their norms."""
    options = [FEW, "train.epochs=1", "train.global_batch=400", "train.lr=1"]
    options += ["train.optimizer.momentum=0", "train.optimizer.weight_decay=0"]
    states = {}
    for name, more in (("free", []), ("clipped", ["train.adaptive_clip=0.001"])):
        run(pool, 1, tmp_path / name, [*options, *more])
        states[name] = last(tmp_path / name).tensors["model"]
    run(pool, 1, tmp_path / "still", [*options, "train.lr=1e-12"])
    start = last(tmp_path / "still").tensors["model"]

    def moved(name: str, key: str) -> float:
        return ((states[name][key] - start[key]).norm() / start[key].norm()).item()

    weight = "layer1.0.conv1.weight"
    assert moved("clipped", weight) < 1.01e-3 < moved("free", weight)
    assert moved("clipped", "fc.weight") == pytest.approx(moved("free", "fc.weight"), rel=1e-5)


def test_layers_have_the_options_of_the_config():
    section = NormSection(name="l1_batch_norm", momentum=0.3, options={"eps": 1e-3})
    layer = make_norm_layer(section, 100)(4)
    assert isinstance(layer, L1BatchNorm)
    assert (layer.momentum, layer.eps, layer.sync) == (0.3, 1e-3, "batch")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync": "running"}, "sync must be batch or none with l1_batch_norm, got 'running'"),
        ({"options": {"window": 3}}, "options must be some of eps, momentum with name l1"),
        ({"name": "group_norm", "options": {"a": 1}}, "options must be left out with name group"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        NormSection(**{"name": "l1_batch_norm", **options})


def test_statistics_over_parts_of_a_step_are_refused(pool, tmp_path):
    with pytest.raises(Exception, match="must be null with l1_batch_norm, got 10"):
        run(
            pool,
            1,
            tmp_path,
            [*RAGGED, "norm.name=l1_batch_norm", "train.norm_batch=10", "train.global_batch=40"],
        )


def test_a_network_with_batch_norms_gets_the_method_with_their_statistics(caplog):
    model = nets.own_norms(1, 10)
    fit_layers(model, NormSection(name="l1_batch_norm"), 100)
    assert type(model[1]) is type(model[5]) is L1BatchNorm
    assert torch.equal(model[1].weight, torch.full_like(model[1].weight, 0.5))
    assert torch.equal(model[1].running_mean, torch.full_like(model[1].running_mean, 0.1))
    assert caplog.messages == [
        "the model makes no layer with norm_layer: its 2 batch norms are l1_batch_norm now"
    ]


def test_a_network_without_a_layer_to_replace_is_refused():
    with pytest.raises(ConfigError, match=r"batch norms where norm.name is l1_batch_norm"):
        fit_layers(nets.no_norms(1, 10), NormSection(name="l1_batch_norm"), 100)


def test_a_rule_puts_a_method_at_a_place_and_another_layer_in_its_place():
    model = nn.Sequential(L1BatchNorm(3), L1BatchNorm(3))
    apply_rules(model, NormSection(name="l1_batch_norm", rules={"1": "group_norm"}), 100)
    assert [type(m) for m in model] == [L1BatchNorm, nn.GroupNorm]
