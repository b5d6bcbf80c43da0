"""Options of a configuration, each in a short run."""

import json
import math
import re

import pytest
import torch
from torch import nn

from syncnorm import SyncBatchNorm, SyncBatchRenorm
from syncnorm.errors import ConfigError
from syncnorm.system import resident_memory
from syncnorm.train.config.file import load_config
from syncnorm.train.config.norm import NormSection
from syncnorm.train.data.builtin import digits
from syncnorm.train.data.feed import MemoryFeed
from syncnorm.train.memory import Need, available_bytes, check_fits, estimate
from syncnorm.train.models import MODELS
from syncnorm.train.norm import FrozenBatchNorm, apply_rules, fit_layers, make_norm_layer
from syncnorm.train.setup import load_feed, make_bare_model, task_of
from syncnorm.train.workers import Workers
from tests.launch import commands
from tests.train import nets, runs
from tests.train.test_loop import THIN

SHORT = ["train.epochs=1", "train.global_batch=128"]


def network(norm: NormSection) -> nn.Module:
    model = MODELS["digits_resnet"](
        in_channels=1, num_classes=10, norm_layer=make_norm_layer(norm, 100)
    )
    apply_rules(model, norm, 100)
    return model


def test_rules_choose_layers_by_name_and_the_first_holds():
    rules = {
        "layer1.0.bn1": "sync_batch_renorm",
        "layer1": "group_norm",
        r"downsample\.1$": "frozen",
    }
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
    message = (
        r"`norm.rules` must each find a normalisation layer, got 'layr1'. "
        "There are bn1, layer1.0.bn1, "
    )
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
    assert outcome.metrics["test"]["accuracy"] > 0.25
    assert len(set(outcome.digests)) == 1
    step = runs.events(tmp_path, "step")[-1]
    assert ("grad_norm" in step) == (options == ["train.clip=0.5"])


def test_autocast_computes_in_bfloat16(pool, tmp_path):
    losses = []
    for name, options in (("wide", []), ("narrow", ["train.autocast=bfloat16"])):
        (tmp_path / name).mkdir()
        pool(1).run(runs.train_digits, str(tmp_path / name), [*SHORT, THIN, *options])
        losses.append(runs.events(tmp_path / name, "step")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert abs(losses[0] - losses[1]) > 1e-5 * losses[0]


@pytest.mark.slow
def test_compiled_it_is_the_same_training(tmp_path):
    losses = []
    for name in ("false", "true"):
        options = [*SHORT, "train.dtype=float64", f"train.compile={name}"]
        done = commands.run([*commands.SYNCNORM, "train", "digits", *options], tmp_path)
        assert done.returncode == 0, done.stderr
        losses.append(
            [
                event["loss"]
                for event in runs.events(tmp_path / done.stdout.splitlines()[-1], "step")
            ]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_profile_and_tensorboard(pool, tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    options = [*SHORT, "follow.profile=4", "follow.loggers.tensorboard={}", "follow.every=5"]
    pool(2).run(runs.train_digits, str(tmp_path), options)
    for rank in range(2):
        trace = json.loads((tmp_path / "profile" / f"rank-{rank}.json").read_text())
        assert any("conv" in event.get("name", "") for event in trace["traceEvents"])

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss", "lr", "samples_per_second", "test_accuracy"} <= set(board.Tags()["scalars"])
    assert [point.step for point in board.Scalars("loss")] == [5, 10]


def needed(*options: str) -> tuple[Need, nn.Module]:
    """Estimate the memory of a step; also the network that it was estimated with."""
    config, cpu = load_config("digits", ["launch.workers=1", *options]), torch.device("cpu")
    feed = MemoryFeed(digits(None), config, cpu)
    model = make_bare_model(config, cpu, feed, 100, ("tests",))
    return estimate(config, Workers(0, 1, cpu), feed, model, task_of(config, cpu, feed)), model


def test_memory_is_estimated_from_what_a_forward_keeps():
    (plain, _), (double, _) = needed(), needed("train.dtype=float64")
    assert double.per_sample / plain.per_sample == pytest.approx(2, rel=0.1)
    assert double.fixed == 2 * plain.fixed
    # Values, gradients and momentum; and the average; Adam keeps two.
    assert plain.fixed == 3 * 4 * 77754
    assert needed("train.ema=0.9")[0].fixed == 4 * 4 * 77754
    adam, _ = needed("train.optimizer.name=Adam", "train.optimizer.momentum=null")
    assert adam.fixed == 4 * 4 * 77754
    assert plain.samples == 64
    assert needed("train.norm_batch=8", "launch.micro_batch=16")[0].samples == 16
    # A process of many tests gives memory back in between.
    assert plain.process == pytest.approx(resident_memory(), rel=0.2)
    assert plain.total == plain.process + plain.fixed + 64 * plain.per_sample


def test_memory_of_a_gpu_that_the_process_holds_is_there_for_a_step(monkeypatch):
    """A trial leaves it with torch's allocator; the data set and the parameters are in the need."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (7 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5 * 2**30)
    workers = Workers(0, 1, torch.device("cuda", 0))
    assert available_bytes(load_config("digits"), workers, 1) == 12 * 2**30


def test_a_forward_may_be_small_where_no_layer_of_ours_is_left():
    """As the steps are placed: there is no statistic that needs its samples at once."""
    config = load_config("digits", ["launch.workers=1", "launch.micro_batch=16"])
    config = config.model_copy(update={"norm": NormSection(rules={".*": "frozen"})})
    cpu = torch.device("cpu")
    feed, workers = MemoryFeed(digits(None), config, cpu), Workers(0, 1, cpu)
    model, task = make_bare_model(config, cpu, feed, 100), task_of(config, cpu, feed)
    assert estimate(config, workers, feed, model, task).samples == 16


@pytest.mark.parametrize("sync", ["batch", "running", "lagged", "none"])
@pytest.mark.parametrize("name", ["rows", "Volumes", "own_norms"])
def test_memory_is_estimated_with_our_layers_for_any_number_of_dimensions(name, sync):
    code = f"model.name=tests.train.nets:{name}"
    random = torch.get_rng_state()
    need, model = needed(code, f"norm.sync={sync}")
    state = model.state_dict()
    assert next(layer.sync for layer in model.modules() if isinstance(layer, SyncBatchNorm)) == sync
    assert all(int(value) == 0 for key, value in state.items() if "num_batches" in key), (
        "the trial leaves no trace"
    )
    torch.set_rng_state(random)
    theirs, _ = needed(code, "norm.name=batch_norm", "norm.sync=none")
    assert need.per_sample == pytest.approx(theirs.per_sample, rel=0.1)


def test_a_network_that_cannot_be_copied_is_not_tried(caplog):
    need, _ = needed("model.name=tests.train.nets:Locked")
    assert need.per_sample == 0
    assert (
        "what a forward keeps of a sample is not known: TypeError: cannot pickle '_thread.lock' "
        "object" in caplog.text
    )


def test_what_does_not_fit_is_refused_with_its_figures():
    need = Need(400 * 2**20, 100 * 2**20, 2**20 // 2, 64)
    check_fits(need, need.total, 0)
    message = re.escape(
        "must be such that a step fits into memory, got one that needs 532.00 MiB: 400.00 MiB for "
        "the process with its "
        "data, 100.00 MiB for parameters, gradients and optimizer, and 64 samples in a forward of "
        "512.00 KiB each. "
        "Worker 3 has 531.00 MiB. Set launch.micro_batch to at most 62, or take more workers."
    )
    with pytest.raises(ConfigError, match=message):
        check_fits(need, 531 * 2**20, 3)
    with pytest.raises(
        ConfigError,
        match=r"Worker 0 has 500.00 MiB. Take fewer workers, a smaller model or more memory.",
    ):
        check_fits(need, 500 * 2**20, 0)


NETS = "tests.train.nets"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["launch.memory_gib=0.05"],
            "`launch.micro_batch` must be such that a step fits into memory",
        ),
        (
            [f"model.name={NETS}:no_norms"],
            "got one that has none. Make its layers with the norm_layer",
        ),
        (
            [f"model.name={NETS}:no_module"],
            f"must return a torch.nn.Module, got function of '{NETS}:no_module'",
        ),
        (
            [f"model.name={NETS}:Maps", "model.options.kind=map"],
            "got shape (4, 10, 6, 6) for 4 samples of 10 classes",
        ),
        (
            [f"model.name={NETS}:Maps", "model.options.kind=few"],
            "got shape (4, 9) for 4 samples of 10 classes",
        ),
        (
            [f"model.name={NETS}:Maps", "model.options.kind=flat"],
            "got shape (1440,) for 4 samples of 10 classes",
        ),
        (
            [f"model.name={NETS}:Maps", "model.options.kind=dict"],
            "got shape (4, 10, 6, 6) for 4 samples of 10 classes",
        ),
        (
            [f"data.name={NETS}:two_folders"],
            "must return a syncnorm.train.data.splits.Splits(train, test, num_classes=..., in_channels",
        ),
        (
            [f"data.name={NETS}:masks"],
            "got (1437, 1, 8, 8) and (1437, 8, 8). Other data come as a Splits",
        ),
        (
            [f"data.name={NETS}:one_class"],
            "must have several classes for task classify, got one: there is nothing to tell apart",
        ),
        (
            [f"data.name={NETS}:two_folders", "data.options.size=3"],
            f"`data.options` must fit '{NETS}:two_folders': got an unexpected keyword",
        ),
        (
            [f"task.name={NETS}:two_folders", "task.options.size=3"],
            f"`task.options` must fit '{NETS}:two_folders': ",
        ),
        (
            ["train.optimizer.name=Muon"],
            "`train.optimizer` must take the model's parameters, got Muon: ValueError: Muon only",
        ),
        (
            ["train.optimizer.differentiable=true"],
            "`train.optimizer` must step on cpu, got SGD with {'differentiable': True, ",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_alike_before_the_first_step(pool, options, message):
    first, second = pool(2).run(runs.refused, options)
    assert message in first
    assert first == second, "with the figures of the same worker"


def test_a_set_of_one_class_can_be_evaluated():
    """The accuracy of a run on samples that are all of one class is a question like others."""
    config, device = load_config("digits", [f"data.name={NETS}:one_class"]), torch.device("cpu")
    assert task_of(config, device, load_feed(config, device, ("tests",))).best == "accuracy"


def converted(**options) -> nn.Sequential:
    model = nets.own_norms(1, 10)
    fit_layers(model, NormSection(**options), 100)
    return model


@pytest.mark.parametrize("sync", ["batch", "running", "none"])
@pytest.mark.parametrize("name", ["sync_batch_norm", "sync_batch_renorm"])
def test_a_network_that_makes_no_layer_with_norm_layer_is_converted(name, sync, caplog):
    model = converted(name=name, sync=sync)
    kind = SyncBatchNorm if name == "sync_batch_norm" else SyncBatchRenorm
    assert type(model[1]) is type(model[5]) is kind
    assert (model[1].sync, model[1].eps, model[5].eps) == (sync, 1e-3, 1e-5)
    assert model[1].momentum == (0.1 if kind is SyncBatchNorm else 0.01)
    check_kept(model)
    assert caplog.messages == [
        f"the model makes no layer with norm_layer: its 2 batch norms are {name} now"
    ]


def check_kept(model: nn.Sequential) -> None:
    for layer in (model[1], model[5]):
        assert torch.equal(layer.weight, torch.full_like(layer.weight, 0.5))
        assert torch.equal(layer.running_mean, torch.full_like(layer.running_mean, 0.1))
        assert torch.equal(layer.running_var, torch.full_like(layer.running_var, 3))


def test_the_configurations_eps_and_momentum_hold_where_it_says_other_than_the_default():
    layer = converted(eps=1e-2, momentum=0.3)[1]
    assert (layer.eps, layer.momentum) == (1e-2, 0.3)


def test_a_network_that_makes_no_layer_with_norm_layer_is_frozen_with_its_statistics(caplog):
    model = converted(name="frozen").train()
    assert isinstance(model[1], FrozenBatchNorm)
    assert isinstance(model[5], FrozenBatchNorm)
    check_kept(model)
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 10)
    assert caplog.messages == [
        "the model makes no layer with norm_layer: its 2 batch norms are frozen now"
    ]


def test_torchs_own_layers_stay_where_they_are_asked_for(caplog):
    assert [type(converted(name="batch_norm")[place]) for place in (1, 5)] == [
        nn.BatchNorm2d,
        nn.BatchNorm1d,
    ]
    for name in ("batch_norm", "group_norm", "frozen"):
        fit_layers(nets.no_norms(1, 10), NormSection(name=name), 100)
    assert caplog.messages == []


def test_layers_that_are_left_out_are_named(caplog):
    model = nn.Sequential(nn.BatchNorm2d(3), SyncBatchNorm(3), nn.BatchNorm2d(3).eval())
    fit_layers(model, NormSection(), 100)
    assert type(model[0]) is nn.BatchNorm2d
    assert caplog.messages == ["batch norms that are not made with norm_layer are not pooled: 0"]


class WithAct(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def test_a_layer_that_does_more_than_normalise_is_not_exchanged():
    model = nn.Sequential(SyncBatchNorm(3), WithAct(3))
    with pytest.raises(ConfigError, match=r"got '1', a WithAct, whose own forward would be lost"):
        apply_rules(model, NormSection(rules={"1": "frozen"}), 100)
    with pytest.raises(ConfigError, match=r"norm.name sync_batch_norm fits: .*'0' is a WithAct"):
        fit_layers(nn.Sequential(WithAct(3)), NormSection(), 100)


def test_a_rule_keeps_running_statistics():
    model = converted()
    apply_rules(model, NormSection(rules={"1": "frozen", "5": "sync_batch_renorm"}), 100)
    assert (type(model[1]), type(model[5])) == (FrozenBatchNorm, SyncBatchRenorm)
    check_kept(model)


def test_a_converted_network_trains_pooled_and_is_built_once(pool, tmp_path):
    for outcome, built in pool(2).run(
        runs.train_code, str(tmp_path), "own_norms", ["train.global_batch=128"]
    ):
        assert built == 1
        assert len(set(outcome.digests)) == 1
    folder = tmp_path / "own"
    folder.mkdir()
    options = ["train.global_batch=128", "norm.name=batch_norm", "norm.sync=none"]
    (outcome, _), *_ = pool(2).run(runs.train_code, str(folder), "own_norms", options)
    assert len(set(outcome.digests)) == 2, "torch's own layers are each worker's"
