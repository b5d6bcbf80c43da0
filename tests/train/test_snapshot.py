"""Snapshots: what goes in comes out, to the bit."""

import hashlib
import json
import math
import re
from collections import Counter, OrderedDict
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch
import torch

from syncnorm.errors import InputError
from syncnorm.train.checkpoint.capture import Progress
from syncnorm.train.checkpoint.snapshot import Snapshot
from tests.train.snapshots import assert_equal, make_snapshot, names

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
]


def test_what_lies_on_disk(store):
    path = store.write(make_snapshot())
    assert path == store.folder / "step-00000012"
    assert names(store.folder) == ["step-00000012"]
    listed = ["ema.safetensors", "model.safetensors", "optimizer.pt", "rng.pt", "state.json"]
    assert names(path) == sorted([*listed, "manifest.json"])

    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["step"]) == (
        "syncnorm-checkpoint",
        1,
        12,
    )
    assert sorted(manifest["files"]) == listed
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    # with nothing of ours
    assert_equal(
        safetensors.torch.load_file(path / "ema.safetensors"), make_snapshot().tensors["ema"]
    )
    assert torch.load(path / "optimizer.pt", weights_only=True)["lr"] == 0.1
    assert json.loads((path / "state.json").read_text())["cursor"] == [1, 2]


def test_what_is_read_is_what_was_written(store):
    snapshot = make_snapshot()
    assert_equal(store.read(store.write(snapshot)), snapshot)
    with pytest.raises(AssertionError):
        assert_equal(make_snapshot(fill=2e-7), snapshot)


def test_tensors_of_every_kind(store):
    base = torch.randn(2, 3, 4, 5)
    tensors = {str(dtype): (base * 100).to(dtype) for dtype in DTYPES}
    tensors |= {f"{dtype} of none": torch.zeros(0, 3, dtype=dtype) for dtype in DTYPES}
    tensors |= {f"{dtype} of no dimension": torch.ones((), dtype=dtype) for dtype in DTYPES}
    tensors |= {
        "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
        "channels last": base.to(memory_format=torch.channels_last),
        "transposed": base.mT,
        "every second": base[..., ::2],
        "expanded": torch.randn(3, 1).expand(3, 4),
        "parameter": torch.nn.Parameter(base),
        "tied": base,
    }
    snapshot = Snapshot(0, {"model": tensors}, {"rng": tensors}, {})
    back = store.read(store.write(snapshot))
    expected = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    assert_equal(back.tensors["model"], expected)
    assert_equal(back.states["rng"], expected)
    assert_equal(store.read(store.write(snapshot.on_cpu())), back)


def test_a_view_is_saved_without_the_rest_of_its_storage(store):
    path = store.write(Snapshot(1, {}, {"rng": torch.zeros(1 << 20)[:1]}, {}))
    assert (path / "rng.pt").stat().st_size < 1 << 12


def test_plain_values_of_every_kind(store):
    states = {
        "plain": [
            None,
            True,
            1 << 80,
            0.1,
            float("-inf"),
            1j,
            "a\n\0",
            b"\xff",
            torch.float16,
            torch.device("cpu"),
        ],
        "deep": {"a": (1, [{"b": ()}]), 3: torch.Size([2, 3]), None: {}, (1, "x"): 0},
        "ordered": OrderedDict([("b", 1), ("a", 2)]),
        "counter": Counter({30: 1, 80: 2}),  # MultiStepLR's milestones
    }
    assert_equal(store.read(store.write(Snapshot(1, {}, states, {}))).states, states)


def test_facts_that_are_not_finite_are_json_all_the_same(store):
    progress = Progress(1, 2, 2, loss_sum=math.inf, metrics={"loss": math.nan}, best=-math.inf)
    facts = {"position": asdict(progress), "list": [-math.inf, (math.nan,)]}
    path = store.write(Snapshot(1, {}, {}, facts))
    read = json.loads((path / "state.json").read_text(), parse_constant=pytest.fail)
    assert read["list"] == ["-inf", ["nan"]]
    for kept in (store.read(path), Snapshot(1, {}, {}, facts).on_cpu()):
        back = Progress()
        back.load_facts(kept.facts["position"])
        assert (back.loss_sum, back.best) == (math.inf, -math.inf)
        assert back.metrics is not None
        assert math.isnan(back.metrics["loss"])


def test_an_optimizer_goes_on_exactly(store):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
        return model, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], gamma=0.3)

    def train(model, optimizer, schedule, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
            schedule.step()

    undisturbed = make()
    train(*undisturbed, 3)
    model, optimizer, schedule = undisturbed
    states = {
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "rng": torch.get_rng_state(),
    }
    path = store.write(Snapshot(3, {"model": model.state_dict()}, states, {}))
    train(*undisturbed, 3)

    resumed = make()
    back = store.read(path)
    for part, state in zip(
        resumed, (back.tensors["model"], *map(back.states.get, ("optimizer", "schedule")))
    ):
        part.load_state_dict(state)
    torch.set_rng_state(back.states["rng"])
    train(*resumed, 3)
    for one, other in zip(resumed, undisturbed, strict=True):
        assert_equal(one.state_dict(), other.state_dict())


def test_a_copy_does_not_show_what_training_does_next():
    snapshot = make_snapshot()
    copy = snapshot.on_cpu()
    assert_equal(copy, make_snapshot())
    snapshot.tensors["model"]["weight"].add_(1)
    snapshot.states["optimizer"]["state"][0]["exp_avg"].zero_()
    snapshot.states["optimizer"]["state"][1] = {}
    snapshot.facts["cursor"].append(3)
    assert_equal(copy, make_snapshot())
    with pytest.raises(AssertionError):
        assert_equal(snapshot, make_snapshot())


def test_copies_share_no_storage_though_the_tensors_do():
    tensor = torch.zeros(4)
    copy = Snapshot(
        1, {"model": {"a": tensor, "b": tensor}}, {"rng": [tensor[1:], tensor]}, {}
    ).on_cpu()
    copies = [*copy.tensors["model"].values(), *copy.states["rng"], tensor]
    assert len({each.untyped_storage().data_ptr() for each in copies}) == 5
    assert copies[2].untyped_storage().nbytes() == 12


class Mine:
    pass


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"step": -1}, "`step` must be a count of steps below 10^18, got -1"),
        ({"step": True}, "`step` must be a count of steps below 10^18, got True"),
        ({"tensors": {"../model": {}}}, "must have lower case words as names, got '../model'"),
        ({"states": {"Rng": 1}}, "must have lower case words as names, got 'Rng'"),
        (
            {"tensors": {"model": {"a": 1}}},
            "`tensors['model']` must be tensors by name, got 'a': int",
        ),
        (
            {"states": {"rng": {"a": [0, Mine()]}}},
            "`states['rng']['a'][1]` must be a tensor, a plain value or a",
        ),
        ({"states": {"rng": {"a": [0, Mine()]}}}, "container of them, got Mine"),
        (
            {"states": {"rng": torch.randn(2).numpy()}},
            "`states['rng']` must be a tensor, a plain value or a container",
        ),
        ({"states": {"rng": torch.randn(2).double().numpy()[0]}}, "got float64"),
        (
            {"facts": {"path": Path()}},
            "`facts` must be what JSON can hold: Object of type PosixPath is not JSON",
        ),
    ],
)
def test_what_could_not_be_read_back_is_refused_at_once(store, parts, message):
    good = {"step": 1, "tensors": {}, "states": {}, "facts": {}}
    with pytest.raises(InputError, match=re.escape(message)):
        Snapshot(**{**good, **parts}).on_cpu()
    with pytest.raises(InputError, match=re.escape(message)):
        store.write(Snapshot(**{**good, **parts}))
    assert not store.folder.exists() or names(store.folder) == []


def test_a_type_that_safetensors_has_not(store):
    with pytest.raises(
        InputError, match=re.escape("`tensors['ema']` must be of types that safetensors has, got")
    ):
        store.write(Snapshot(1, {"ema": {"a": torch.zeros(1, dtype=torch.complex128)}}, {}, {}))
    assert names(store.folder) == []
