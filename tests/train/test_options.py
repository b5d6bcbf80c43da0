"""What a configuration can ask for, each in a short run."""

import json
import math

import pytest
import torch
from torch import nn

from syncnorm import SyncBatchNorm, SyncBatchRenorm
from syncnorm.errors import ConfigError
from syncnorm.train.config_norm import NormSection
from syncnorm.train.models import MODELS
from syncnorm.train.norm import FrozenBatchNorm, apply_rules, make_norm_layer
from tests.launch import commands
from tests.train import runs

SHORT = ["train.epochs=1", "train.global_batch=128"]


def network(norm: NormSection) -> nn.Module:
    model = MODELS["digits_resnet"](in_channels=1, num_classes=10, norm_layer=make_norm_layer(norm, 100))
    apply_rules(model, norm, 100)
    return model


def test_rules_choose_layers_by_name_and_the_first_holds():
    rules = {"layer1.0.bn1": "sync_batch_renorm", "layer1": "group_norm", r"downsample\.1$": "frozen"}
    model = network(NormSection(rules=rules))
    kinds = {name: type(m) for name, m in model.named_modules() if hasattr(m, "eps")}
    assert kinds["bn1"] is SyncBatchNorm
    assert kinds["layer1.0.bn1"] is SyncBatchRenorm
    assert kinds["layer1.0.bn2"] is nn.GroupNorm
    assert kinds["layer2.0.downsample.1"] is FrozenBatchNorm
    assert kinds["layer3.0.bn2"] is SyncBatchNorm


def test_weights_are_kept_when_a_rule_exchanges_a_layer():
    def zeros(channels: int) -> nn.Module:
        layer = SyncBatchNorm(channels)
        nn.init.zeros_(layer.weight)
        return layer

    model = nn.Sequential(nn.Conv2d(1, 6, 3), zeros(6))
    apply_rules(model, NormSection(rules={"1": "group_norm"}), 100)
    assert isinstance(model[1], nn.GroupNorm)
    assert model[1].num_groups == 2
    assert torch.equal(model[1].weight, torch.zeros(6))


def test_a_rule_that_finds_nothing_is_refused():
    message = r"`norm.rules` must each find a normalisation layer, got 'layr1'. The layers are bn1, layer1.0.bn1, "
    with pytest.raises(ConfigError, match=message):
        network(NormSection(rules={"bn1": "frozen", "layr1": "group_norm"}))


def test_a_frozen_layer_only_evaluates():
    layer = FrozenBatchNorm(3).train()
    assert not layer.training
    x = torch.randn(4, 3, 2, 2) + 5
    torch.testing.assert_close(layer(x), x / math.sqrt(1 + 1e-5))
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize(
    "options",
    [
        ["train.autocast=bfloat16"],
        ["norm.name=group_norm", "norm.sync=none"],
        ["train.optimizer.name=AdamW", "train.optimizer.momentum=null", "train.lr=0.003"],
        ["train.schedule.name=StepLR", "train.schedule.step_size=4", "train.schedule.warmup=0.2"],
        ["data.augment.crop=1", "data.augment.flip=true", "data.augment.cutout=3"],
        ["train.ema=0.5"],
        ["train.clip=0.5"],
    ],
    ids=" ".join,
)
def test_it_trains(pool, tmp_path, options):
    (outcome, _), *_ = pool(2).run(runs.train_digits, str(tmp_path), [*SHORT, *options])
    assert outcome.test_accuracy is not None
    assert outcome.test_accuracy > 0.25
    assert len(set(outcome.digests)) == 1
    step = runs.events(tmp_path, "step")[-1]
    assert ("grad_norm" in step) == (options == ["train.clip=0.5"])


def test_autocast_computes_in_bfloat16(pool, tmp_path):
    losses = []
    for name, options in (("wide", []), ("narrow", ["train.autocast=bfloat16"])):
        (tmp_path / name).mkdir()
        pool(1).run(runs.train_digits, str(tmp_path / name), [*SHORT, *options])
        losses.append(runs.events(tmp_path / name, "step")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert abs(losses[0] - losses[1]) > 1e-5 * losses[0]


@pytest.mark.slow
def test_compiled_it_is_the_same_training(tmp_path):
    losses = []
    for name in ("false", "true"):
        options = [*SHORT, "train.dtype=float64", f"train.compile={name}", "launch.timeout_seconds=90"]
        done = commands.run([*commands.SYNCNORM, "train", "digits", *options], tmp_path)
        assert done.returncode == 0, done.stderr
        losses.append([event["loss"] for event in runs.events(tmp_path / done.stdout.splitlines()[-1], "step")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_profile_and_tensorboard(pool, tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    options = [*SHORT, "follow.profile=4", "follow.tensorboard=true", "follow.every=5"]
    pool(2).run(runs.train_digits, str(tmp_path), options)
    for rank in range(2):
        trace = json.loads((tmp_path / "profile" / f"rank-{rank}.json").read_text())
        assert any("conv" in event.get("name", "") for event in trace["traceEvents"])

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss", "lr", "samples_per_second", "test_accuracy"} <= set(board.Tags()["scalars"])
    assert [point.step for point in board.Scalars("loss")] == [5, 10]


def test_memory_is_estimated_from_what_a_forward_keeps():
    from syncnorm.train.config_file import load_config
    from syncnorm.train.data import digits
    from syncnorm.train.memory import estimate

    def need(*options: str):
        return estimate(load_config("digits", ["launch.workers=1", *options]), 1, digits(None))

    plain, double = need(), need("train.dtype=float64")
    assert double.per_sample / plain.per_sample == pytest.approx(2, rel=0.1)
    assert double.fixed == 2 * plain.fixed
    # Values, gradients and momentum; and the average; Adam keeps two.
    assert plain.fixed == 3 * 4 * 77754
    assert need("train.ema=0.9").fixed == 4 * 4 * 77754
    adam = need("train.optimizer.name=Adam", "train.optimizer.momentum=null")
    assert adam.fixed == 4 * 4 * 77754
    assert plain.samples == 64
    assert need("train.norm_batch=8", "launch.micro_batch=16").samples == 16
