"""The networks: their sizes, shapes and names."""

import pytest
import torch
from torch import nn

from syncnorm import RenormSchedule, SyncBatchNorm, SyncBatchRenorm
from syncnorm.train.config.norm import NormSection, RenormSection
from syncnorm.train.models import MODELS
from syncnorm.train.norm import BatchNorm, FrozenBatchNorm, apply_rules, make_norm_layer


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "num_classes", "parameters"),
    [
        ("resnet18_cifar", 10, 11_173_962),
        ("resnet18_imagenet", 1000, 11_689_512),
        ("resnet50_imagenet", 1000, 25_557_032),
        ("resnet50_cifar", 10, 23_520_842),
    ],
)
def test_parameter_counts_are_the_published_ones(name, num_classes, parameters):
    assert (
        count(MODELS[name](in_channels=3, num_classes=num_classes, norm_layer=nn.BatchNorm2d))
        == parameters
    )


@pytest.mark.parametrize("batch", [2, 0])
@pytest.mark.parametrize(
    ("name", "channels", "side"),
    [
        ("digits_resnet", 1, 8),
        ("resnet18_cifar", 3, 32),
        ("resnet18_imagenet", 3, 64),
        ("resnet50_cifar", 3, 16),
        ("resnet50_imagenet", 3, 64),
    ],
)
def test_logits_also_of_an_empty_shard(name, channels, side, batch):
    model = MODELS[name](in_channels=channels, num_classes=7, norm_layer=SyncBatchNorm)
    logits = model(torch.randn(batch, channels, side, side))
    assert logits.shape == (batch, 7)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "feature_side"),
    [("resnet18_cifar", 4), ("resnet18_imagenet", 1), ("digits_resnet", 8)],
)
def test_resolution_of_the_last_stage(name, feature_side):
    model = MODELS[name](in_channels=3, num_classes=2, norm_layer=nn.BatchNorm2d).eval()
    sides = []
    model.get_submodule(model.stages[-1]).register_forward_hook(
        lambda module, args, out: sides.append(out.shape[-1])
    )
    model(torch.randn(1, 3, 32, 32))
    assert sides == [feature_side]


def test_names_are_those_of_torchvision():
    model = MODELS["resnet50_imagenet"](in_channels=3, num_classes=1000, norm_layer=nn.BatchNorm2d)
    names = set(model.state_dict())
    assert len(names) == 320
    assert {
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.downsample.0.weight",
        "layer1.0.downsample.1.num_batches_tracked",
        "layer3.5.conv3.weight",
        "layer4.2.bn3.bias",
        "fc.bias",
    } <= names


@pytest.mark.parametrize(
    ("section", "kind", "sync"),
    [
        (NormSection(momentum=0.2, eps=1e-3), SyncBatchNorm, "batch"),
        (NormSection(sync="none", momentum=0.2, eps=1e-3), SyncBatchNorm, "none"),
        (NormSection(name="batch_norm", momentum=0.2, eps=1e-3), BatchNorm, None),
    ],
)
def test_norm_layers_are_those_of_the_config(section, kind, sync):
    layer = make_norm_layer(section, 1000)(4)
    assert type(layer) is kind
    assert isinstance(layer, nn.BatchNorm2d | SyncBatchNorm)
    assert (layer.num_features, layer.momentum, layer.eps) == (4, 0.2, 1e-3)
    assert getattr(layer, "sync", None) == sync


def test_renorm_layers_are_those_of_the_config():
    section = NormSection(name="sync_batch_renorm", sync="running", renorm=RenormSection(r_max=2.0))
    layer = make_norm_layer(section, 13_000)(4)
    assert isinstance(layer, SyncBatchRenorm)
    assert (layer.sync, layer.momentum, layer.running_average) == ("running", 0.01, "std")
    assert layer.schedule == RenormSchedule(2.0, 5.0, 500, 4000, 2500), (
        "the paper's, scaled to the run"
    )
    given = RenormSection(warmup_steps=1, r_steps=2, d_steps=3, running_average="var")
    layer = make_norm_layer(NormSection(name="sync_batch_renorm", renorm=given), 13_000)(4)
    assert isinstance(layer, SyncBatchRenorm)
    assert layer.schedule == RenormSchedule(3.0, 5.0, 1, 2, 3)
    assert layer.running_average == "var"


def test_a_rule_keeps_the_mode_of_the_layer_that_it_exchanges():
    section = NormSection(
        name="batch_norm", sync="none", rules={"0": "group_norm", "2": "sync_batch_norm"}
    )
    model = nn.Sequential(
        nn.BatchNorm2d(4).eval(), nn.ReLU(), nn.BatchNorm2d(4), FrozenBatchNorm(4)
    ).eval()
    model[2].train()
    apply_rules(model, section, 10)
    assert [type(module) for module in model] == [
        nn.GroupNorm,
        nn.ReLU,
        SyncBatchNorm,
        FrozenBatchNorm,
    ]
    assert [module.training for module in model] == [False, False, True, False]
