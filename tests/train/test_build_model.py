"""Networks by name: what callables are given, and those of known packages."""

import sys

import pytest
import torch
from torch import nn

from syncnorm import SyncBatchNorm
from syncnorm.errors import ConfigError
from syncnorm.train.build_model import build_model
from syncnorm.train.config.callables import check_callables
from syncnorm.train.config.file import load_config
from syncnorm.train.config.norm import NormSection
from syncnorm.train.norm import fit_layers, make_norm_layer, warn_of_no_pooling

HERE = "tests.train.test_build_model"


def make(name: str, in_channels: int | None = 3, allowed=("tests",), **options) -> nn.Module:
    return build_model(
        name, options, allowed, in_channels=in_channels, num_classes=5, norm_layer=SyncBatchNorm
    )


def kept(**given) -> nn.Module:
    module = nn.Identity()
    vars(module)["given"] = given
    return module


def takes_any(**options) -> nn.Module:
    return kept(**options)


def takes_some(num_classes, width=3) -> nn.Module:
    return kept(num_classes=num_classes, width=width)


def takes_one_and_any(num_classes, **options) -> nn.Module:
    return kept(num_classes=num_classes, **options)


def counts(num_classes) -> nn.Module:
    return nn.Linear(num_classes + 1, 2)


def takes_none() -> nn.Module:
    return kept()


SHAPE = {"in_channels": 3, "num_classes": 5, "norm_layer": SyncBatchNorm}


@pytest.mark.parametrize(
    ("name", "options", "given"),
    [
        ("takes_any", {}, SHAPE),
        ("takes_any", {"num_classes": 2, "depth": 1}, SHAPE | {"num_classes": 2, "depth": 1}),
        ("takes_one_and_any", {}, SHAPE),
        ("takes_some", {}, {"num_classes": 5, "width": 3}),
        ("takes_some", {"width": 4}, {"num_classes": 5, "width": 4}),
        ("takes_none", {}, {}),
    ],
)
def test_a_callable_is_given_what_it_takes_and_options_win(name, options, given):
    assert vars(make(f"{HERE}:{name}", **options))["given"] == given


def test_options_that_a_callable_does_not_take():
    message = f"`model.options` must fit '{HERE}:takes_some': got an unexpected .* 'depth'"
    with pytest.raises(ConfigError, match=message):
        make(f"{HERE}:takes_some", depth=3)


def test_a_callable_that_takes_a_number_of_classes_needs_one():
    options = {"in_channels": 3, "num_classes": None, "norm_layer": SyncBatchNorm}
    message = (
        r"`model.options.num_classes` may have to be given for '.*counts', since .*: TypeError: "
    )
    with pytest.raises(ConfigError, match=message):
        build_model(f"{HERE}:counts", {}, ["tests"], **options)
    assert isinstance(
        build_model(f"{HERE}:counts", {"num_classes": 2}, ["tests"], **options), nn.Linear
    )
    with pytest.raises(TypeError):
        make(f"{HERE}:counts", num_classes="2")
    assert vars(build_model(f"{HERE}:takes_any", {}, ["tests"], **options))["given"] == options


def test_a_network_that_is_built_in_needs_the_shape_of_the_data():
    message = "must not be digits_resnet where the data set does not say its number of channels"
    with pytest.raises(ConfigError, match=message):
        make("digits_resnet", in_channels=None)


@pytest.mark.parametrize("package", ["torchvision", "timm", "transformers"])
def test_a_known_package_that_is_missing_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = f"a network of an installed package, got one of '{package}', .* Install {package}, "
    with pytest.raises(ConfigError, match=message):
        make(f"{package}:resnet18")


NAMES = [
    "torchvision:resnet18",
    "timm:resnet18.a1_in1k",
    "transformers:ResNetForImageClassification",
    "transformers:/some where/on.disk",
    "transformers:microsoft/resnet-18",
]


@pytest.mark.parametrize("name", NAMES)
def test_known_packages_need_no_leave_and_take_options(name):
    config = load_config("digits", [f"model.name={name}", "model.options.depth=3"])
    check_callables(config, ())
    assert config.model.options == {"depth": 3}


@pytest.mark.parametrize(
    "name", ["timm:hf-hub:a/b", "torchvision:../x", "transformers:1", "keras:x.y"]
)
def test_other_names_are_no_names_of_known_packages(name):
    with pytest.raises(ConfigError, match=r"`model.name` must be one of .* got "):
        load_config("digits", [f"model.name={name}"])


def pooled(model: nn.Module) -> int:
    fit_layers(model, NormSection(), 10)
    return sum(isinstance(module, SyncBatchNorm) for module in model.modules())


def test_networks_of_torchvision():
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    assert pooled(make("torchvision:resnet18")) == 20
    segments = make("torchvision:fcn_resnet50")
    assert pooled(segments) == 54
    assert segments(torch.randn(2, 3, 32, 32))["out"].shape == (2, 5, 32, 32)
    with pytest.raises(ConfigError, match=r"for inputs of 1 channel.*, which is for 3"):
        make("torchvision:resnet18", in_channels=1)
    with pytest.raises(ConfigError, match="The nearest is 'torchvision:resnet18'"):
        make("torchvision:resnet19")
    with pytest.raises(ConfigError, match=r"`model.options.weights` must be left out"):
        make("torchvision:resnet18", weights="DEFAULT")


def test_networks_of_timm():
    pytest.importorskip("timm", reason="timm is not installed")
    model = make("timm:resnet18", in_channels=1)
    assert pooled(model) == 20
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    with pytest.raises(ConfigError, match="The nearest is 'timm:resnet18'"):
        make("timm:resnet19")
    with pytest.raises(ConfigError, match=r"`model.options.pretrained` .* add --allow timm"):
        make("timm:resnet18", pretrained=True)


def test_networks_of_transformers(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    model = make("transformers:ResNetForImageClassification", in_channels=1, **sizes)
    assert model(torch.randn(2, 1, 32, 32)).logits.shape == (2, 5)
    model.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    again = make(f"transformers:{tmp_path}", in_channels=1)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert pooled(again) == 6
    with pytest.raises(ConfigError, match=r"must name a model class .* got 'transformers:AutoMod"):
        make("transformers:AutoModel")
    with pytest.raises(ConfigError, match=f"'transformers:{tmp_path}/no', where there is none"):
        make(f"transformers:{tmp_path}/no")
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        make(f"transformers:{tmp_path}")


@pytest.mark.parametrize(
    ("keys", "is_frozen", "cause"),
    [
        ({}, False, None),
        ({}, True, "all 1 of syncnorm's are in evaluation mode"),
        ({"sync": "none"}, False, "norm.sync is none"),
        ({"name": "group_norm"}, False, r"there is none of syncnorm's (norm.name group_norm)"),
    ],
    ids=str,
)
def test_a_run_without_a_pooled_layer_says_so(caplog, keys, is_frozen, cause):
    norm = NormSection(**keys)
    model = nn.Sequential(nn.Linear(3, 3), make_norm_layer(norm, 10)(3))
    model[1].train(not is_frozen)
    warn_of_no_pooling(model, norm)
    said = (
        []
        if cause is None
        else [f"no normalisation layer pools its statistics over the workers: {cause}"]
    )
    assert caplog.messages == said
