"""Weights that a run begins with, parts that are frozen, and runs that get more epochs."""

import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from syncnorm import SyncBatchNorm
from syncnorm.model.norm_parameters import norm_parameters
from syncnorm.train.checkpoint.evaluated import evaluated_state
from syncnorm.train.models import MODELS
from syncnorm.train.parameters import freeze
from tests.train import runs
from tests.train.test_loop import FEW, THIN, assert_same_bits, curve, last, run

TINY = [FEW, "train.epochs=1", "train.global_batch=110"]
# That of docs/weights.md.
ALL_BUT_NORMS = r"^(?!.*(bn|norm|downsample\.1)).*\.(weight|bias)$"
FROZEN = "train.freeze=[^conv1, ^bn1, 'layer1$', '^fc.bias']"


@pytest.fixture(scope="module")
def trained(pool, tmp_path_factory) -> Path:
    """A run with a moving average."""
    folder = tmp_path_factory.mktemp("trained")
    run(pool, 1, folder, [*TINY, "train.ema=0.5"])
    return folder


@pytest.fixture(scope="module")
def state(trained) -> dict[str, torch.Tensor]:
    return evaluated_state(last(trained))


def begin(pool, path: Path, *options: str, workers: int = 2) -> tuple[dict, list[str]]:
    """The model with which a run begins, and what is said of it."""
    first, other = pool(workers).run(runs.begun_with, [f"model.weights={path}", *options])
    assert_same_bits(first[0], other[0])
    return first


def without_counters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if value.is_floating_point()}


def write(folder: Path, kind: str, state: dict[str, torch.Tensor]) -> Path:
    """Write weights as others do."""
    names = list(state)
    match kind:
        case "safetensors":
            safetensors.torch.save_file(state, folder / "w.safetensors")
            return folder / "w.safetensors"
        case "bare":
            torch.save(state, folder / "w.pth")
            return folder / "w.pth"
        case "whole checkpoint":
            theirs = {f"model.{name}": value for name, value in state.items()}
            other = {"state": {}, "param_groups": []}
            torch.save({"epoch": 3, "state_dict": theirs, "optimizer": other}, folder / "w.ckpt")
            return folder / "w.ckpt"
        case "parts":
            halves = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
            for file, half in halves.items():
                safetensors.torch.save_file({n: state[n] for n in half}, folder / file)
            places = {name: file for file, half in halves.items() for name in half}
            index = json.dumps({"metadata": {}, "weight_map": places})
            (folder / "model.safetensors.index.json").write_text(index)
            return folder
        case _:
            torch.save(state, folder / "pytorch_model.bin")
            return folder


@pytest.mark.parametrize("kind", ["safetensors", "bare", "whole checkpoint", "parts", "folder"])
def test_a_run_begins_with_weights_of_others(pool, tmp_path, state, kind):
    begun, _ = begin(pool, write(tmp_path, kind, state))
    assert_same_bits(without_counters(begun), without_counters(state))
    assert int(begun["bn1.num_batches_tracked"]) == 0 != int(state["bn1.num_batches_tracked"])


def test_a_run_begins_with_the_evaluated_model_of_another(pool, trained, state):
    plain, _ = begin(pool, trained, "model.weights=null")
    for path in (trained, next((trained / "checkpoints").glob("step-*"))):
        begun, lines = begin(pool, path)
        assert_same_bits(without_counters(begun), without_counters(state))
        assert not torch.equal(plain["fc.weight"], begun["fc.weight"])
        assert not any("weights" in line for line in lines)


def test_it_goes_on_without_the_weights_to_the_same_bits(pool, tmp_path, trained):
    weights = tmp_path / "weights"
    shutil.copytree(trained, weights)
    options = [FEW, "train.epochs=2", "train.global_batch=110", f"model.weights={weights}"]
    run(pool, 2, tmp_path / "whole", options)
    run(pool, 2, tmp_path / "parts", options, stop_at=2, rank=0)
    shutil.rmtree(weights)
    run(pool, 2, tmp_path / "parts", options)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert_same_bits(last(tmp_path / "parts").tensors, last(tmp_path / "whole").tensors)
    run(pool, 1, tmp_path / "drawn", options[:-1])
    assert curve(tmp_path / "whole")[0] < 0.9 * curve(tmp_path / "drawn")[0]


def test_what_fits_is_loaded_and_the_rest_is_listed(pool, tmp_path, state):
    others = {
        name: value for name, value in state.items() if name not in ("conv1.weight", "bn1.bias")
    }
    others |= {"fc.weight": torch.zeros(7, 64), "head.a": torch.zeros(1), "head.b": torch.zeros(2)}
    path = write(tmp_path, "safetensors", others)
    drawn, _ = begin(pool, tmp_path, "model.weights=null")
    begun, lines = begin(pool, path, "model.partial=true")
    left = ("conv1.weight", "bn1.bias", "fc.weight")
    for name, value in without_counters(begun).items():
        assert torch.equal(value, (drawn if name in left else state)[name]), name
    assert [line for line in lines if str(path) in line] == [
        f"weights of {path}: 2 of the model that the state lacks: conv1.weight, bn1.bias",
        f"weights of {path}: 2 of the state that the model does not have: head.a, head.b",
        f"weights of {path}: 1 of other shapes: fc.weight (7, 64) for (10, 64)",
    ]


def bad_weights(folder: Path, kind: str, state: dict[str, torch.Tensor]) -> Path:
    path = folder / {"code": "w.pt", "torn": "w.safetensors", "text": "w.txt"}.get(kind, "w.bin")
    match kind:
        case "code":
            torch.save({"model": print}, path)
        case "torn":
            whole = write(folder, "safetensors", state).read_bytes()
            path.write_bytes(whole[:-50])
        case "text" | "damaged":
            path.write_bytes(b"weights")
        case "several":
            torch.save({"generator": state, "discriminator": state}, path)
        case "none":
            torch.save({"epoch": 3}, path)
        case "empty":
            return folder
        case "escape":
            index = {"weight_map": {"fc.weight": "../w.bin"}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
            return folder
        case "unsaved":
            (folder / "checkpoints").mkdir()
            return folder
        case "other":
            torch.save({f"encoder.{name}": value for name, value in state.items()}, path)
        case "nothing fits":
            torch.save({"a.b": torch.zeros(2), "c": torch.zeros(3)}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "No such file or directory"),
        ("code", "it holds more than tensors and plain values"),
        ("damaged", "it holds more than tensors and plain values"),
        ("torn", "must name weights that can be read, got "),
        ("text", "it is none of .safetensors, .pt, .pth, .bin, .ckpt"),
        ("several", "several state dicts: generator, discriminator"),
        ("none", "it has no state dict"),
        ("empty", "no model.safetensors or pytorch_model.bin there"),
        ("escape", "'../w.bin' is no name of a file beside it"),
        ("unsaved", "checkpoints: holds no checkpoint"),
        ("nothing fits", "nothing for 'conv1.weight'"),
    ],
)
def test_bad_weights_are_one_error_before_the_first_step(pool, tmp_path, state, kind, message):
    path = bad_weights(tmp_path, kind, state)
    first, other = pool(2).run(runs.refused, [*TINY, f"model.weights={path}"])
    assert first == other
    assert first.startswith("`model.weights` must")
    assert message in first
    assert ("model.partial=true" in first) == (kind == "nothing fits")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fc.weight", lambda t: t.to("meta"), "must be a plain tensor with numbers in it"),
        ("fc.weight", lambda t: t.to_sparse(), "must be a plain tensor with numbers in it"),
        ("fc.weight", lambda t: t.to(torch.uint8), "must be floating, got torch.uint8"),
        ("fc.bias", lambda t: t.to(torch.complex64), "must be floating, got torch.complex64"),
        (
            "fc.bias",
            lambda t: t.double() + 1e39,
            "must be numbers that torch.float32 has, got larger",
        ),
        ("bn1.running_var", lambda t: -t, "must be at least 0, got a negative variance"),
    ],
    ids=["meta", "sparse", "bytes", "complex", "large", "negative"],
)
def test_numbers_that_are_none_of_the_models_are_refused(
    pool, tmp_path, state, name, change, message
):
    torch.save({**state, name: change(state[name])}, tmp_path / "w.bin")
    first, other = pool(2).run(runs.refused, [*TINY, f"model.weights={tmp_path / 'w.bin'}"])
    assert first == other
    assert re.search(rf"`model.weights` must fit the model, got .*: '{name}' {message}", first)
    assert "model.partial" not in first


def test_weights_of_which_nothing_fits_are_refused(pool, tmp_path, state):
    path = bad_weights(tmp_path, "nothing fits", state)
    options = [*TINY, f"model.weights={path}", "model.partial=true"]
    (message,) = pool(1).run(runs.refused, options)
    assert "must have entries that fit the model, got a.b, c" in message


def test_what_is_frozen_stays_and_the_rest_is_trained(pool, tmp_path):
    drawn, _ = begin(pool, tmp_path, "model.weights=null")
    run(pool, 2, tmp_path, [*TINY, "train.epochs=2", "train.ema=0.5", FROZEN])
    snapshot = last(tmp_path)
    for got in (snapshot.tensors["model"], evaluated_state(snapshot)):
        same = {name for name, value in got.items() if torch.equal(value, drawn[name])}
        frozen = {n for n in got if n.startswith(("conv1.", "bn1.", "layer1."))} | {"fc.bias"}
        assert same == frozen
    assert {"bn1", "layer1", "layer1.0.bn2"} <= set(snapshot.facts["in_evaluation"])
    assert "layer2.0.bn1" not in snapshot.facts["in_evaluation"]


@pytest.mark.parametrize("name", ["digits_resnet", "resnet50_imagenet"])
@pytest.mark.parametrize("patterns", [[r"conv\d$", r"downsample\.0$", "^fc$"], [ALL_BUT_NORMS]])
def test_normalisation_layers_alone_are_trained(name, patterns):
    model = MODELS[name](in_channels=1, num_classes=10, norm_layer=SyncBatchNorm)
    freeze(model, patterns)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {*norm_parameters(model)}
    assert all(m.training for m in model.modules() if isinstance(m, SyncBatchNorm))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("[^conv1, layr2]", "got 'layr2'. The nearest is 'layer2'"),
        ("['']", "must leave a parameter to train, got [''], which find all 29 parameters"),
    ],
)
def test_bad_expressions_of_what_is_frozen(pool, patterns, message):
    (text,) = pool(1).run(runs.refused, [*TINY, f"train.freeze={patterns}"])
    assert text.startswith("`train.freeze` must")
    assert message in text


LONG = [
    FEW,
    THIN,
    "train.global_batch=110",
    "norm.name=sync_batch_renorm",
    "train.schedule.warmup=0",
]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_finished_run_gets_more_epochs_as_if_it_had_them_from_the_start(
    pool, tmp_path, world_size
):
    options = [*LONG, "train.schedule.name=constant", "norm.renorm.warmup_steps=2"]
    options += ["norm.renorm.r_steps=4", "norm.renorm.d_steps=5"]
    run(pool, world_size, tmp_path / "whole", [*options, "train.epochs=4"])
    for epochs in (1, 3, 4):
        run(pool, world_size, tmp_path / "parts", [*options, f"train.epochs={epochs}"])
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    got, expected = last(tmp_path / "parts"), last(tmp_path / "whole")
    assert_same_bits(got.tensors, expected.tensors)
    assert_same_bits(got.states, expected.states)
    assert got.facts == expected.facts


@pytest.mark.parametrize(
    ("schedule", "stop_at"),
    [
        (["train.schedule.name=cosine", "train.schedule.warmup=0.5"], 2),
        (["train.schedule.name=linear"], None),
        (["train.schedule.name=StepLR", "train.schedule.step_size=2"], None),
    ],
)
def test_from_there_on_the_learning_rate_is_that_of_the_longer_run(
    pool, tmp_path, schedule, stop_at
):
    options = [*LONG, *schedule, "train.rates.fc=0.5"]
    run(pool, 1, tmp_path / "whole", [*options, "train.epochs=4"])
    stop = {} if stop_at is None else {"stop_at": stop_at}
    run(pool, 1, tmp_path / "parts", [*options, "train.epochs=2"], **stop)
    ((_, lines),) = pool(1).run(
        runs.said_by_train, str(tmp_path / "parts"), [*options, "train.epochs=4"]
    )
    done = stop_at or 6
    whole, parts = (
        [event["lr"] for event in runs.events(tmp_path / name, "step")]
        for name in ("whole", "parts")
    )
    assert parts[done:] == pytest.approx(whole[done:], rel=1e-12)
    assert len(parts) == 12
    (line,) = [line for line in lines if "grows" in line]
    assert line.startswith(
        f"train.epochs grows from 2 to 4: from step {done + 1} on all is as in a run of 4, the "
        f"learning rate {whole[done]:.3g}"
    )


@pytest.mark.parametrize(
    "schedule",
    [
        ["name=OneCycleLR", "max_lr=0.1", "total_steps=10"],
        ["name=StepLR", "step_size=2", "warmup=0.9"],
    ],
)
def test_epochs_do_not_grow_where_the_schedule_cannot(pool, tmp_path, schedule):
    options = [*LONG, *(f"train.schedule.{each}" for each in schedule)]
    run(pool, 1, tmp_path, [*options, "train.epochs=2"], stop_at=2)
    ((text, _),) = pool(1).run(runs.said_by_train, str(tmp_path), [*options, "train.epochs=3"])
    assert text.startswith("`train.epochs` must stay 2 with schedule ")


def test_epochs_do_not_shrink(pool, tmp_path):
    run(pool, 1, tmp_path, [*TINY, "train.epochs=2"])
    (message,) = pool(1).run(runs.refused_in, str(tmp_path), TINY)
    assert message.endswith("of another configuration: train.epochs: 2 there, 1 here")
