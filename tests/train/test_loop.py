"""A whole run, without a launcher."""

import copy
import json
from pathlib import Path

import pytest
import torch

from syncnorm.testing import RankFailure
from syncnorm.train.buffers import SharedBuffers
from syncnorm.train.checkpoint.snapshot import Snapshot
from syncnorm.train.checkpoint.store import CheckpointStore
from tests.train import runs

FEW = "data.name=tests.train.nets:few_digits"
THIN = "model.name=tests.train.nets:thin"
# 317 = 4 * 79 + 1: the fifth step of an epoch has one sample, so all shards of it but the first
# are empty.
RAGGED = [
    FEW,
    THIN,
    "train.dtype=float64",
    "train.global_batch=79",
    "train.epochs=2",
    "train.lr=0.02",
]


def run(pool, workers: int, folder: Path, options: list[str], **stop) -> tuple:
    folder.mkdir(exist_ok=True)
    return pool(workers).run(runs.train_digits, str(folder), options, *stop.values())[0]


def curve(folder: Path) -> list[float]:
    """The loss of each step; of a step on record twice the later."""
    return list({event["step"]: event["loss"] for event in runs.events(folder, "step")}.values())


def last(folder: Path) -> Snapshot:
    snapshot, _, faults = CheckpointStore(folder / "checkpoints").newest()
    assert snapshot is not None
    assert not faults
    return snapshot


def assert_same_bits(got: object, expected: object, place: str = "") -> None:
    if isinstance(expected, torch.Tensor):
        assert isinstance(got, torch.Tensor)
        assert torch.equal(got, expected), place
    elif isinstance(expected, dict):
        assert isinstance(got, dict)
        assert got.keys() == expected.keys(), place
        for key, value in expected.items():
            assert_same_bits(got[key], value, f"{place}.{key}")
    elif isinstance(expected, list | tuple):
        assert isinstance(got, list | tuple)
        assert len(got) == len(expected), place
        for index, value in enumerate(expected):
            assert_same_bits(got[index], value, f"{place}[{index}]")
    else:
        assert got == expected, place


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_run_is_the_same_on_any_number_of_workers(pool, tmp_path, world_size):
    alone, together = tmp_path / "alone", tmp_path / "together"
    run(pool, 1, alone, RAGGED)
    run(pool, world_size, together, RAGGED)
    for kind in ("step", "epoch"):
        for one, many in zip(runs.events(alone, kind), runs.events(together, kind), strict=True):
            assert many["loss"] == pytest.approx(one["loss"], rel=1e-12)
            assert many.pop("test_loss", 0) == pytest.approx(one.pop("test_loss", 0), rel=1e-12)
            different = {"loss": 0, "seconds": 0, "time": 0}
            assert {**many, **different} == {**one, **different}
    assert len(runs.events(alone, "step")) == 10


def test_local_statistics_make_it_another_run(pool, tmp_path):
    losses = []
    for sync in ("batch", "none"):
        run(pool, 2, tmp_path / sync, [*RAGGED, "train.epochs=1", f"norm.sync={sync}"])
        losses.append(runs.events(tmp_path / sync, "step")[0]["loss"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_the_first_loss_is_that_of_ten_equally_likely_digits(pool, tmp_path):
    run(pool, 1, tmp_path, ["train.epochs=1", "train.global_batch=1437"])
    assert runs.events(tmp_path, "step")[0]["loss"] == pytest.approx(
        torch.tensor(10.0).log().item(), abs=0.5
    )


@pytest.mark.parametrize(("norm", "different"), [("norm.sync=batch", 1), ("norm.sync=none", 2)])
def test_what_a_run_leaves(pool, tmp_path, norm, different):
    options = ["train.epochs=2", "train.global_batch=500", norm, "follow.every=2"]
    (outcome, position), (other, _) = pool(2).run(runs.train_digits, str(tmp_path), options)
    assert outcome == other
    assert outcome.is_done
    assert len(set(outcome.digests)) == different
    assert position.step == 6

    epochs = runs.events(tmp_path, "epoch")
    assert [(event["epoch"], event["step"]) for event in epochs] == [(1, 3), (2, 6)]
    assert [event["step"] for event in runs.events(tmp_path, "step")] == [1, 2, 3, 4, 5, 6]
    assert epochs[-1]["test_accuracy"] == outcome.metrics["test"]["accuracy"]
    assert all(event["seconds"] > 0 and event["lr"] > 0 for event in epochs)
    assert [event["step"] for event in runs.events(tmp_path, "interval")] == [2, 4, 6]
    for event in runs.events(tmp_path, "layers"):
        assert event["layers"]["bn1"]["count"] > 0
    (end,) = runs.events(tmp_path, "end")
    assert end["digests"] == outcome.digests
    (start,) = runs.events(tmp_path, "start")
    assert (start["world_size"], start["step"], start["resumed_from"]) == (2, 0, None)

    snapshot = last(tmp_path)
    assert snapshot.step == 6
    assert snapshot.facts["config"]["train"]["global_batch"] == 500
    assert snapshot.tensors["model"]["bn1.num_batches_tracked"].item() == 6
    assert snapshot.states["optimizer"]["state"][0]["momentum_buffer"].abs().max() > 0
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "metrics.jsonl"}


# Four steps an epoch, of 80 samples and, the last, of 77.
SHORT = [
    FEW,
    "train.epochs=2",
    "train.global_batch=80",
    "train.ema=0.9",
    "follow.every=3",
    "checkpoint.every=2",
]
KINDS = {
    "pooled": [],
    "hidden renorm": ["norm.name=sync_batch_renorm", "norm.sync=running", "norm.renorm.d_max=1"],
    "lagged": ["norm.sync=lagged"],
    "local": ["norm.sync=none"],
    "groups": ["train.norm_batch=20", "launch.micro_batch=20"],
    "noise": ["model.name=tests.train.nets:Noisy"],
    "family": ["norm.name=l1_batch_norm"],
    "late sums": ["norm.name=power_norm", "norm.options.warmup=3", "norm.options.scaling_groups=4"],
    "frozen": ["train.freeze=[conv1, layer2, fc.bias]"],
    "modes": ["model.name=tests.train.nets:Freezing"],
    "own buffers": ["model.name=tests.train.nets:Remembering"],
    "own and local": [
        "model.name=tests.train.nets:Remembering",
        "norm.name=batch_norm",
        "norm.sync=none",
    ],
    "economical": [
        "train.autocast=float16",
        "train.optimizer.weight_decay=0.01",
        "train.rates.layer1=0.5",
        "train.recompute=[layer2]",
        "train.channels_last=true",
    ],
    "augmented": [
        "data.augment.crop=1",
        "data.augment.flip=true",
        "data.augment.cutout=2",
        "train.clip=1",
    ],
    # Whose product of momenta is float32 beside parameters of float64.
    "single numbers": [
        "train.dtype=float64",
        "train.optimizer.name=NAdam",
        "train.optimizer.momentum=null",
    ],
    # Whose state is paired with weights by their places in memory. Not the thin network: docs/versions.md has
    # what torch does to memory there on some processors.
    "fused": [
        "model.name=digits_resnet",
        "train.channels_last=true",
        "train.optimizer.fused=true",
    ],
}


def test_lagged_statistics_go_on_with_another_number_of_workers(pool, tmp_path):
    """Their averages of gradients have the scale of the loss, which has that of the workers."""
    options = [*SHORT, THIN, "norm.sync=lagged", "train.dtype=float64"]
    run(pool, 1, tmp_path / "whole", options)
    run(pool, 1, tmp_path / "parts", options, stop_at=3, rank=0)
    run(pool, 2, tmp_path / "parts", options)
    expected = last(tmp_path / "whole").tensors["model"]
    for name, value in last(tmp_path / "parts").tensors["model"].items():
        # Of two workers.
        factor = 2.0 if name.endswith("lagged_gradient") else 1.0
        torch.testing.assert_close(
            value, expected[name] * factor if factor > 1 else expected[name], rtol=1e-6, atol=1e-9
        )


# With three workers the order of a sum can differ, with two it cannot.
@pytest.mark.parametrize(
    ("kind", "world_size"),
    [
        *((kind, 2) for kind in KINDS),
        *((kind, 3) for kind in ("pooled", "hidden renorm", "groups")),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(pool, tmp_path, kind, world_size):
    """Stopped in the first epoch by the last worker, and in the second at an epoch's end."""
    options = [*SHORT, *KINDS[kind]]
    if not any(each.startswith("model.name=") for each in options):
        options.append(THIN)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(pool, world_size, whole, options)
    for stop_at, done in ((2, False), (4, False), (None, True)):
        outcome, position = run(
            pool, world_size, parts, options, stop_at=stop_at, rank=world_size - 1
        )
        assert outcome.is_done == done
        assert position.step == (stop_at or 8)
    assert curve(parts) == curve(whole)
    got, expected = last(parts), last(whole)
    assert got.step == expected.step == 8
    assert_same_bits(got.tensors, expected.tensors)
    assert_same_bits(got.states, expected.states)
    assert got.facts == expected.facts
    resumed = [event["resumed_from"] for event in runs.events(parts, "start")]
    assert resumed == [None, "step-00000002", "step-00000004"]


def test_the_average_of_a_buffer_that_has_grown_starts_again():
    model = torch.nn.Module()
    model.register_buffer("gone", torch.ones(2))
    model.register_buffer("queue", torch.zeros(0, 2))
    average = copy.deepcopy(model)
    model.gone = None
    model.queue = torch.full((300, 2), 5.0)
    SharedBuffers(model, average).resize_average()
    assert torch.equal(average.get_buffer("queue"), model.get_buffer("queue"))
    # So that torch, which averages buffers in pairs by their places, pairs those of one name.
    assert [name for name, _ in average.named_buffers()] == ["queue"]


def test_a_model_that_comes_in_evaluation_mode_is_trained(pool, tmp_path):
    for arrives in ("training", "evaluating", "frozen"):
        options = [
            FEW,
            "model.name=tests.train.nets:Net",
            f"model.options.arrives={arrives}",
            "train.global_batch=110",
        ]
        run(pool, 2, tmp_path / arrives, [*options, "train.epochs=2"])
    assert curve(tmp_path / "evaluating") == curve(tmp_path / "training")
    assert curve(tmp_path / "frozen") != curve(tmp_path / "training")
    counts = {
        arrives: [
            int(last(tmp_path / arrives).tensors["model"][f"{part}.1.num_batches_tracked"])
            for part in parts
        ]
        for arrives, parts in {"evaluating": ["stem", "body"], "frozen": ["stem", "body"]}.items()
    }
    assert counts == {"evaluating": [6, 6], "frozen": [0, 6]}


def test_a_run_stopped_on_four_workers_goes_on_with_two_and_three(pool, tmp_path):
    options = [
        FEW,
        THIN,
        "train.dtype=float64",
        "train.epochs=2",
        "train.global_batch=40",
        "train.norm_batch=10",
    ]
    run(pool, 1, tmp_path / "whole", options)
    for workers, stop_at in ((4, 5), (2, 10), (3, None)):
        run(pool, workers, tmp_path / "parts", options, stop_at=stop_at, rank=0)
    assert curve(tmp_path / "parts") == pytest.approx(curve(tmp_path / "whole"), rel=1e-11)
    assert [event["world_size"] for event in runs.events(tmp_path / "parts", "start")] == [4, 2, 3]


def test_a_finished_run_stays_finished(pool, tmp_path):
    options = [FEW, "train.epochs=1", "train.global_batch=110"]
    first, _ = run(pool, 1, tmp_path, options)
    again, position = run(pool, 1, tmp_path, options)
    assert again == first
    assert position.step == len(curve(tmp_path)) == 3


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(pool, tmp_path):
    options = [FEW, "train.epochs=2", "train.global_batch=110", "checkpoint.every=1"]
    run(pool, 2, tmp_path / "whole", options)
    run(pool, 2, tmp_path / "hurt", options, stop_at=4, rank=0)
    # A busy machine may leave out a step whose turn comes while the one before is being written.
    before = sorted(path.name for path in (tmp_path / "hurt" / "checkpoints").glob("step-*"))[-2]
    with (tmp_path / "hurt" / "checkpoints" / "step-00000004" / "optimizer.pt").open("r+b") as file:
        file.truncate(100)
    run(pool, 2, tmp_path / "hurt", options)
    assert curve(tmp_path / "hurt") == curve(tmp_path / "whole")
    (fault,) = runs.events(tmp_path / "hurt", "fault")
    assert "optimizer.pt" in fault["message"]
    assert [e["resumed_from"] for e in runs.events(tmp_path / "hurt", "start")] == [
        None,
        before,
    ]


def test_a_run_none_of_whose_checkpoints_can_be_read_does_not_begin_again(pool, tmp_path):
    """The weights may still be good, and a new run's would replace them."""
    options = [FEW, "train.epochs=1", "train.global_batch=110", "checkpoint.every=1"]
    run(pool, 1, tmp_path, options)
    folders = sorted((tmp_path / "checkpoints").glob("step-*"))
    for folder in folders:
        with (folder / "optimizer.pt").open("r+b") as file:
            file.truncate(100)
    before = [(folder / "model.safetensors").read_bytes() for folder in folders]
    (message,) = pool(1).run(runs.refused_in, str(tmp_path), options)
    assert f"got {len(folders)} that are not; the newest: " in message
    assert "optimizer.pt" in message
    assert [(folder / "model.safetensors").read_bytes() for folder in folders] == before


def test_another_configuration_does_not_go_on(pool, tmp_path):
    run(pool, 1, tmp_path, [FEW, "train.epochs=1", "train.global_batch=110"])
    changed = [FEW, "train.epochs=1", "train.global_batch=80", "train.lr=1"]
    (message,) = pool(1).run(runs.refused_in, str(tmp_path), changed)
    assert (
        "is of another configuration: train.global_batch: 110 there, 80 here, train.lr: " in message
    )
    assert message.endswith(" there, 1.0 here")


def test_a_loss_that_is_not_finite_stops_all_workers_and_is_found(pool, tmp_path):
    with pytest.raises(RankFailure) as caught:
        pool(2).run(runs.train_bad_image, str(tmp_path), {"train": {"not_finite": "stop"}})
    text = str(caught.value)
    message = (
        "the loss of worker(s) 0, 1 is not finite, "
        "first at the output of layer 'breaking' (Break) on worker"
    )
    assert text.count("NotFiniteError: step ") == 2
    assert text.count(message) == 2
    (fault,) = runs.events(tmp_path, "fault")
    assert fault["kind"] == "not_finite"
    assert message in fault["message"]


def test_a_step_that_is_not_finite_is_left_out(pool, tmp_path):
    for sync in ("batch", "running"):
        folder = tmp_path / sync
        folder.mkdir()
        outcome, _ = pool(2).run(
            runs.train_bad_image,
            str(folder),
            {"train": {"not_finite": "skip"}, "norm": {"sync": sync}},
        )[0]
        assert outcome.is_done
        losses = [event["loss"] for event in runs.events(folder, "step")]
        assert losses.count("nan") == 1
        assert len(losses) == 12
        taken = [loss for loss in losses if loss != "nan"]
        (epoch,) = runs.events(folder, "epoch")
        assert epoch["loss"] == pytest.approx(sum(taken) / 11, rel=1e-12)
        snapshot = last(folder)
        assert all(value.isfinite().all() for value in snapshot.tensors["model"].values())
        assert int(snapshot.tensors["model"]["bn1.num_batches_tracked"]) == 11
        (fault,) = runs.events(folder, "fault")
        assert fault["kind"] == "not_finite"


def test_events_are_json(pool, tmp_path):
    run(pool, 1, tmp_path, [FEW, "train.epochs=1", "train.global_batch=110"])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line, parse_constant=pytest.fail)["event"] for line in lines]
    assert events.count("step") == 3
