"""Tasks of every kind, from data sets through loaders: one curve on any number of workers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from syncnorm.errors import ConfigError
from syncnorm.train.checkpoint.store import CheckpointStore
from syncnorm.train.task.meters import Meters
from tests.train import runs
from tests.train.files import noise, write_image

TASKS = "tests.train.tasks"


def sections(net: str, source: str, learned: dict[str, Any] | None = None, **changes: Any) -> dict:
    """A configuration in float64: 13 steps an epoch, of 24 samples and, the last, of 13."""
    merged = {
        "model": {"name": f"{TASKS}:{net}"},
        "data": {"name": f"{TASKS}:{source}"},
        "task": learned or {},
        "train": {"epochs": 3, "global_batch": 24, "lr": 0.02, "dtype": "float64"},
        "norm": {"momentum": 0.1},
    }
    for name, section in changes.items():
        merged[name] = {**merged.get(name, {}), **section}
    return merged


FOLDER = {
    "name": "folder",
    "options": {"size": 10, "random_crop": True, "test": 0.2},
    "loader": {"workers": 1},
}
# Four steps an epoch, the last of 3 images: each epoch starts the processes that load them.
MANY_STEPS = {"epochs": 8, "global_batch": 12}
# 61 samples make three steps an epoch, the last of 13.
LONG = {"train": {"epochs": 10}}
KINDS = {
    "rows": sections("Perceptron", "rows"),
    "rows, loader processes": sections("Perceptron", "rows", data={"loader": {"workers": 1}}),
    "labels": sections(
        "Perceptron",
        "rows",
        {"name": "multilabel"},
        data={"options": {"kind": "labels"}},
        train={"lr": 0.5},
    ),
    "values": sections(
        "Perceptron",
        "rows",
        {"name": "regress", "loss": "HuberLoss", "options": {"delta": 0.5}},
        data={"options": {"kind": "values"}},
        train={"lr": 0.2},
        model={"options": {"outputs": 1}},
    ),
    "class weights, smoothed": sections(
        "Perceptron",
        "rows",
        {"options": {"weight": [1.0, 3.0, 0.5, 2.0], "label_smoothing": 0.1}},
    ),
    "average": sections("Perceptron", "rows", train={"ema": 0.9, "clip": 1.0}),
    "contrast": sections("Perceptron", "rows", {"name": f"{TASKS}:Contrast"}),
    # Their files are made by the fixture `images`.
    "image folder": sections("SmallNet", "rows", data=FOLDER, train=MANY_STEPS),
    "image folder, mixed": sections(
        "SmallNet",
        "rows",
        data={**FOLDER, "augment": {"crop": 1, "flip": True, "mixup": 0.4, "cutmix": 1.0}},
        train={**MANY_STEPS, "lr": 0.1},
    ),
    "masks": sections("SmallUNet", "shapes", {"name": "segment"}, **LONG),
    "boxes": sections("TwoHeads", "boxes", {"name": f"{TASKS}:Detect"}, **LONG),
    "masks, several forwards": sections(
        "SmallUNet",
        "shapes",
        {"name": "segment"},
        train={"epochs": 10, "norm_batch": 6},
        launch={"micro_batch": 6},
    ),
}


# The number of workers that each is tried on in a short run of the tests; those that are stopped and
# go on are on all.
RESUMED = ("image folder", "boxes")
FAST = {"rows, loader processes": 2, "masks": 4, **dict.fromkeys(RESUMED)}


def losses(folder: Path) -> list[float]:
    return list({e["step"]: e["loss"] for e in runs.events(folder, "step")}.values())


def metrics(folder: Path) -> list[dict[str, float]]:
    """The metrics of each epoch."""
    return [
        {name: value for name, value in event.items() if name.startswith("test_")}
        for event in runs.events(folder, "epoch")
    ]


def gap(got: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of 48 images of two classes, of which 39 are for training."""
    pytest.importorskip("PIL", reason="the extra data is not installed")
    root = tmp_path_factory.mktemp("images")
    for number in range(48):
        pixels = noise(number, 14, 14)
        pixels[:, :, 0] //= 1 + number % 2
        write_image(root / f"{number % 2}" / f"{number}.png", pixels)
    return root


@pytest.fixture(scope="module")
def configured(images):
    """configured(kind): its whole configuration."""

    def get(kind: str) -> dict[str, Any]:
        options = KINDS[kind]
        if options["data"]["name"] != "folder":
            return options
        return {**options, "data": {**options["data"], "root": str(images)}}

    return get


@pytest.fixture(scope="module")
def alone(pool, configured, tmp_path_factory):
    """alone(kind): the folder of a run on one worker, made once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("alone")
            pool(1).run(runs.train_sections, str(made[kind]), configured(kind))
        return made[kind]

    return get


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [
        pytest.param(kind, size, marks=[] if size == FAST.get(kind, 3) else [pytest.mark.slow])
        for kind in KINDS
        for size in (2, 3, 4)
    ],
)
def test_the_curve_is_that_of_one_worker(pool, alone, configured, tmp_path, kind, world_size):
    expected = losses(alone(kind))
    assert len(expected) >= 30
    assert min(expected) < 0.9 * expected[0], "the run must go somewhere"
    first, *others = pool(world_size).run(runs.train_sections, str(tmp_path), configured(kind))
    assert all(other == first for other in others)
    assert gap(losses(tmp_path), expected) <= 1e-12
    for got, wanted in zip(metrics(tmp_path), metrics(alone(kind)), strict=True):
        assert got == pytest.approx(wanted, rel=1e-11)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in RESUMED else [pytest.mark.slow]) for k in KINDS]
)
def test_a_run_stopped_on_four_workers_goes_on_with_two_and_three(
    pool, alone, configured, tmp_path, kind
):
    for world_size, stop_at in ((4, 10), (2, 20), (3, None)):
        pool(world_size).run(runs.train_sections, str(tmp_path), configured(kind), stop_at)
    assert gap(losses(tmp_path), losses(alone(kind))) <= 1e-12
    starts = [event["world_size"] for event in runs.events(tmp_path, "start")]
    assert starts == [4, 2, 3]


def test_loader_processes_change_no_bit(alone):
    assert losses(alone("rows, loader processes")) == losses(alone("rows"))


STRANGE = {
    "vector": "got the sum of shape (4,)",
    "mean": "must give the loss as a sum, of shape (), and its count, got a Tensor",
    "text": "got the count of type str",
    "number": "got the sum of type float",
    "nothing": "a loss of at least one term",
    "unnamed": "must give the terms of a loss names, got 1 of type int",
    "metrics": "must give metric 'accuracy' as a sum and its count, got tensor(",
}
BROKEN = {
    "stream": "as `train`. The order of an iterable one",
    "empty": "got none in `train`",
    "targets": "must give a class for each sample, (N,) of whole numbers",
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_task_that_gives_something_else_is_refused(pool, kind):
    task = {"name": f"{TASKS}:Strange", "options": {"kind": kind}}
    for message in pool(2).run(runs.refused_sections, sections("Perceptron", "rows", task)):
        assert "`task.name`" in message
        assert STRANGE[kind] in message


@pytest.mark.parametrize(
    ("kind", "named"), [("whole", "the loss"), ("term", "boxes"), ("count of 1", "the loss")]
)
def test_a_mean_in_place_of_a_sum_is_noticed(kind, named, pool, tmp_path):
    task = {"name": f"{TASKS}:Mean", "options": {"kind": kind}}
    options = sections("Perceptron", "rows", task, train={"epochs": 1})
    (lines,) = pool(1).run(runs.warnings_of_sections, str(tmp_path), options)
    (said,) = [line for line in lines if "task.name" in line]
    assert f"twice the samples have the same in {named}: that looks like a mean" in said


@pytest.mark.parametrize("kind", ["contrast", "boxes", "no mean", "constant"])
def test_a_sum_is_not_taken_for_a_mean(kind, pool, tmp_path):
    task = {"name": f"{TASKS}:Mean", "options": {"kind": kind}}
    options = KINDS.get(kind) or sections("Perceptron", "rows", task)
    options = {**options, "train": {**options["train"], "epochs": 1}}
    (lines,) = pool(1).run(runs.warnings_of_sections, str(tmp_path), options)
    assert not [line for line in lines if "task.name" in line]


@pytest.mark.parametrize("sync", ["batch", "none"])
@pytest.mark.parametrize("run", [runs.failed_sections, runs.failed_by_gloo])
@pytest.mark.parametrize(("kind", "theirs"), [("more", "boxes, classes"), ("another", "boxes")])
def test_terms_that_differ_between_workers_are_an_error_on_all(pool, kind, theirs, run, sync):
    task = {"name": f"{TASKS}:OtherTerms", "options": {"kind": kind}}
    options = sections("Perceptron", "rows", task) | {"norm": {"sync": sync}}
    one, other = pool(2).run(run, options)
    assert one == other
    assert re.search(rf"rank 0 .*counts of classes, .*rank 1 .*counts of {theirs}, ", one), one


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("complex", "must give a model of real numbers, which train.dtype says, got 'phase' of"),
        ("buffer", "must give a model of real numbers, which train.dtype says, got 'phase' of"),
        ("lazy", "must give a model whose parameters have their shapes, got a lazy one, 'more."),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(pool, kind, message):
    options = sections("Unfit", "rows", model={"options": {"kind": kind}})
    for error in pool(2).run(runs.refused_sections, options):
        assert f"`model.name` {message}" in error


@pytest.mark.parametrize("kind", BROKEN)
def test_a_data_set_that_cannot_be_trained_on_is_refused(pool, kind):
    options = sections("Perceptron", "broken", data={"options": {"how": kind}})
    for message in pool(2).run(runs.refused_sections, options):
        assert "`data.name` must" in message
        assert BROKEN[kind] in message


@pytest.mark.parametrize("loader", [0, 1])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "sample 20 of train failed: OSError: the disk is gone (worker "),
        ("test raises", "sample 20 of test failed: OSError: the disk is gone (worker 0)"),
        ("class", "sample 20 of train failed: its class must be from 0 to 3, got 12 (worker "),
        (
            "test class",
            "sample 20 of test failed: its class must be from 0 to 3, got 12 (worker 0)",
        ),
        ("held class", "sample 20 of train failed: its class must be from 0 to 3, got 12 (worker "),
        ("shape", "`data.name` must give samples that make a batch: RuntimeError: "),
        ("dies", "`data.loader.workers` must be processes that live, got: DataLoader worker"),
    ],
)
def test_samples_that_cannot_be_read_end_the_run_on_all_workers(pool, how, message, loader):
    if how == "dies" and not loader:
        pytest.skip("it would end the worker itself")
    data = {"options": {"how": how}, "loader": {"workers": loader}}
    # Whether it is held out or not, it has its number in the whole set.
    data |= {"validation": 0.9} if how == "held class" else {}
    options = sections("Perceptron", "broken", data=data, train={"global_batch": 20})
    first, second = pool(2).run(runs.failed_sections, options)
    assert first == second
    assert message in first


def test_metrics_that_exchange_are_refused(pool):
    options = sections("Perceptron", "rows", {"name": f"{TASKS}:GatheredMetric"})
    for message in pool(2).run(runs.refused_sections, options):
        assert "`task.name` must measure without exchanges" in message


@pytest.mark.parametrize("has_rounds", [False, True])
def test_float16_has_room_for_a_loss_over_many_pixels(pool, tmp_path, has_rounds):
    """Its gradients are those of the mean, however many pixels an image has, in each forward."""
    narrow = {"dtype": "float32", "autocast": "float16", "epochs": 4}
    options = sections("SmallUNet", "shapes", {"name": "segment"}, train=narrow)
    if has_rounds:
        options["train"] |= {"global_batch": 4, "norm_batch": 1, "epochs": 1}
        options["data"]["options"] = {"count": 48}
        options["launch"] = {"micro_batch": 1}
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        (outcome, progress), *_ = pool(world_size).run(runs.train_sections, str(folder), options)
        assert outcome.is_done
        assert progress.step == 12
        snapshot, _, _ = CheckpointStore(folder / "checkpoints").newest()
        assert snapshot is not None
        assert snapshot.states["scaler"]["scale"] == 2**16, "no step has overflowed"
    alone, together = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert together == pytest.approx(alone, rel=2e-2)


def test_a_negative_count_ends_the_run_on_all_workers(pool):
    task = {"name": f"{TASKS}:Strange", "options": {"kind": "negative"}}
    for message in pool(2).run(runs.failed_sections, sections("Perceptron", "rows", task)):
        assert "counts are finite and not negative, got -1, -1 of the workers" in message


def test_a_forward_that_only_the_last_step_is_too_large_for_is_refused_at_once(pool):
    """24 samples in 3 statistics are shared by all 4 workers each, 16 in 2 by pairs."""
    options = sections(
        "Perceptron",
        "rows",
        train={"global_batch": 24, "norm_batch": 8},
        data={"options": {"count": 40}},
        launch={"micro_batch": 3},
    )
    for message in pool(4).run(runs.refused_sections, options):
        assert "`launch.micro_batch` must be at least 4" in message


@pytest.mark.parametrize("kind", ["boxes", "contrast"])
def test_a_loss_of_the_whole_step_takes_one_forward(pool, kind):
    options = {**KINDS[kind], "launch": {"micro_batch": 8}}
    options["train"] = {**options["train"], "norm_batch": 8}
    for message in pool(2).run(runs.failed_sections, options):
        assert (
            "`launch.micro_batch` must be such that each worker has its part of a step" in message
        )


def test_metrics_of_torchmetrics_are_those_of_the_whole_set(pool, tmp_path):
    pytest.importorskip("torchmetrics", reason="the extra metrics is not installed")
    metrics = {
        "MulticlassF1Score": {"num_classes": 4},
        "MulticlassRecall": {"num_classes": 4, "average": None},
        "MulticlassAUROC": {"num_classes": 4, "thresholds": 20},
    }
    task = {"metrics": metrics, "best": "MulticlassF1Score"}
    changes = {"train": {"epochs": 1, "lr": 0.5}, "data": {"validation": 0.3}}
    evaluated = []
    # No more processes than must import torchmetrics.
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        (outcome, progress), *_ = pool(world_size).run(
            runs.train_sections, str(folder), sections("Perceptron", "rows", task, **changes)
        )
        evaluated.append(outcome.metrics)
        assert progress.best == outcome.metrics["validation"]["MulticlassF1Score"]
    first, other = evaluated
    for split in ("validation", "test"):
        assert other[split] == pytest.approx(first[split], rel=1e-12)
    recalls = [first["test"][f"MulticlassRecall_{index}"] for index in range(4)]
    assert min(recalls) < max(recalls)
    assert 0 < first["test"]["MulticlassAUROC"] < 1


def _correlation(sizes: list[int]) -> float:
    """The correlation of rows of which this worker has so many."""
    generator = torch.Generator().manual_seed(0)
    rank, rows = dist.get_rank(), torch.randn(2, sum(sizes), generator=generator).double()
    outputs, targets = rows
    meters = Meters({"PearsonCorrCoef": {}}, torch.device("cpu"))
    if sizes[rank]:
        meters.update(outputs.split(sizes)[rank], targets.split(sizes)[rank])
    (result,) = meters.gather().values()
    return result - torch.corrcoef(rows)[0, 1].item()


@pytest.mark.parametrize("sizes", [[2, 3, 4], [9, 0, 0], [0, 0, 9]], ids=str)
def test_a_metric_that_merges_means_is_that_of_the_whole_set(pool, sizes):
    """Also where a worker has no samples, whose means are of nothing."""
    pytest.importorskip("torchmetrics", reason="the extra metrics is not installed")
    assert pool(3).run(_correlation, sizes) == pytest.approx([0, 0, 0], abs=1e-12)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"metrics": {"MulticlassF1": {}}}, "The nearest is 'MulticlassF1Score'"),
        ({"metrics": {"MulticlassF1Score": {}}}, "`task.metrics.MulticlassF1Score` must suit it"),
        (
            {"metrics": {"MulticlassAUROC": {"num_classes": 4}}},
            "must add up, but MulticlassAUROC keeps every sample",
        ),
        (
            {"metrics": {"MulticlassROC": {"num_classes": 4, "thresholds": 5}}},
            "`task.metrics.MulticlassROC` must give a number, or several, got tuple",
        ),
        ({"best": "f2"}, "`task.best` must be measured, got 'f2' of accuracy, loss"),
    ],
    ids=str,
)
def test_metrics_that_cannot_be_measured_are_refused(pool, task, words):
    pytest.importorskip("torchmetrics", reason="the extra metrics is not installed")
    for message in pool(2).run(runs.refused_sections, sections("Perceptron", "rows", task)):
        assert words in message


@pytest.mark.parametrize("name", ["R2Score", "ExplainedVariance", "PearsonCorrCoef"])
def test_metrics_of_numbers_far_from_zero_are_exact(name):
    """Batches are of float32, whose squares lose what sets them apart."""
    pytest.importorskip("torchmetrics", reason="the extra metrics is not installed")
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(4, generator=generator) * 10 + 100
    outputs = torch.randn(4, generator=generator) * 0.1 + 100
    Meters({name: {}}, torch.device("cpu")).check(outputs, targets)


def test_metrics_of_segmentation_are_known():
    pytest.importorskip("torchmetrics", reason="the extra metrics is not installed")
    assert Meters({"MeanIoU": {"num_classes": 3}}, torch.device("cpu")).names == ["MeanIoU"]


def test_metrics_are_tried_in_other_batches():
    """Of one whose range is a batch's own; and of one that gives two numbers, no curve."""
    pytest.importorskip("torchmetrics", reason="the extra metrics is not installed")
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 6, 1, 16, 16, generator=generator) * torch.arange(1.0, 7).view(
        6, 1, 1, 1
    )
    name = "StructuralSimilarityIndexMeasure"
    with pytest.raises(ConfigError, match=r"same on any number of workers, got .* smaller batches"):
        Meters({name: {}}, torch.device("cpu")).check(*images)
    Meters({name: {"data_range": 6.0}}, torch.device("cpu")).check(*images)
    name = "BinaryRecallAtFixedPrecision"
    meters = Meters({name: {"min_precision": 0.5, "thresholds": 9}}, torch.device("cpu"))
    pair = torch.rand(8, generator=generator), torch.arange(8) % 2
    meters.check(*pair)
    with meters.kept() as kept:
        meters.update(*pair)
    assert [each.tolist() for each in kept[0]] == [each.tolist() for each in pair]


def test_a_metric_that_fails_over_several_workers_is_refused_for_one(pool):
    pytest.importorskip("torchmetrics", reason="the extra metrics is not installed")
    task = {"name": "regress", "metrics": {"NormalizedRootMeanSquaredError": {}}}
    options = sections(
        "Perceptron",
        "rows",
        task,
        model={"options": {"outputs": 1}},
        data={"options": {"kind": "values"}},
    )
    (message,) = pool(1).run(runs.refused_sections, options)
    assert "must be one that several workers can measure together, got IndexError" in message


VALIDATED = sections(
    "Perceptron",
    "rows",
    data={"validation": 0.2, "options": {"count": 300}},
    train={"epochs": 30, "lr": 0.5},
)


def test_the_validation_set_decides_and_the_test_set_waits(pool, tmp_path):
    """With patience the run ends early, the same on any number of workers and when resumed."""
    options = {**VALIDATED, "train": {**VALIDATED["train"], "patience": 3}}
    folders = [tmp_path / name for name in ("alone", "together", "parts")]
    for folder in folders:
        folder.mkdir()
    ((outcome, _),) = pool(1).run(runs.train_sections, str(folders[0]), options)
    (other, _), *_ = pool(3).run(runs.train_sections, str(folders[1]), options)
    for world_size, stop_at in ((4, 25), (2, None)):
        (last, _), *_ = pool(world_size).run(runs.train_sections, str(folders[2]), options, stop_at)
    epochs = [runs.events(folder, "epoch") for folder in folders]
    accuracies = [event["validation_accuracy"] for event in epochs[0]]
    assert len(accuracies) < 30
    assert max(accuracies[-3:]) <= max(accuracies[:-3])
    assert accuracies.index(max(accuracies)) == len(accuracies) - 4
    for events in epochs[1:]:
        assert [event["validation_accuracy"] for event in events] == accuracies
    for each in (outcome, other, last):
        assert each.is_done
        assert each.reason == "the last 3 evaluations were no better"
        assert each.metrics["test"]["accuracy"] == outcome.metrics["test"]["accuracy"]
    assert not any("test_accuracy" in event for event in epochs[0])
    (end,) = runs.events(folders[0], "end")
    assert end["test_accuracy"] == outcome.metrics["test"]["accuracy"]
    best = json.loads((folders[0] / "checkpoints" / "best.json").read_text())["step"]
    assert best == 10 * (len(accuracies) - 3)


def test_evaluations_and_saves_every_so_many_steps(pool, tmp_path):
    options = {
        **VALIDATED,
        "train": {**VALIDATED["train"], "epochs": 2, "evaluate_every": 7},
        "checkpoint": {"minutes": 1e-9, "every": 1000, "keep": 100, "best": False},
    }
    pool(2).run(runs.train_sections, str(tmp_path), options)
    assert [event["step"] for event in runs.events(tmp_path, "evaluation")] == [7, 14]
    epochs = runs.events(tmp_path, "epoch")
    assert ["validation_accuracy" in event for event in epochs] == [False, True]
    saved = {event["step"] for event in runs.events(tmp_path, "checkpoint")}
    assert 20 in saved
    assert saved - {20}, "one for the clock"
    assert not (tmp_path / "checkpoints" / "best.json").exists()


@pytest.mark.parametrize(
    ("section", "key"), [("train", {"patience": 3}), ("checkpoint", {"best": True})]
)
def test_without_a_validation_set_nothing_is_chosen(pool, section, key):
    options = sections("Perceptron", "rows", **{section: key})
    for message in pool(2).run(runs.refused_sections, options):
        assert f"`{section}.{next(iter(key))}` must be left out" in message
        assert "Set data.validation" in message
    options = VALIDATED | {section: VALIDATED.get(section, {}) | key, "task": {"best": ""}}
    for message in pool(2).run(runs.refused_sections, options):
        assert f"`{section}.{next(iter(key))}` must be left out where no metric decides" in message


@pytest.mark.parametrize(
    "launch", [{}, {"micro_batch": 4}, {"micro_batch": 12}], ids=["whole", "small", "large"]
)
def test_a_task_that_calls_the_model_again_is_the_same_on_any_number_of_workers(
    pool, tmp_path, launch
):
    """The running statistics of several statistics follow once a step."""
    options = sections("Perceptron", "rows", {"name": f"{TASKS}:TwoViews"}, launch=launch)
    options["train"] |= {"epochs": 1, "norm_batch": 4}
    found: list[dict[str, float]] = []
    for world_size in (1, 2, 3):
        (folder := tmp_path / str(world_size)).mkdir()
        (outcome, _), *_ = pool(world_size).run(runs.train_sections, str(folder), options)
        found.append(outcome.metrics["test"])
    assert found[1:] == [pytest.approx(found[0], rel=1e-9)] * 2


@pytest.mark.parametrize(
    ("net", "task", "got"),
    [
        (
            "Perceptron",
            f"{TASKS}:MeanTimesCount",
            "one that is not in the loss. A mean over nothing",
        ),
        ("Folding", "classify", "RuntimeError: cannot reshape tensor of 0 elements"),
    ],
)
def test_a_part_without_samples_is_tried_before_the_first_step(pool, tmp_path, net, task, got):
    """It would come at the end of an epoch: 301 samples are 12 steps, and one of 13."""
    options = sections(net, "rows", {"name": task}, train={"global_batch": 60, "epochs": 1})
    for message in pool(2).run(runs.refused_sections, options):
        assert "must take a batch without samples, which some of 2 workers have" in message
        assert got in message
    options["train"]["global_batch"] = 24
    (outcome, _), *_ = pool(2).run(runs.train_sections, str(tmp_path), options)
    assert outcome.is_done


def test_parameters_that_are_to_be_trained_later_are_there_from_the_start(pool):
    """Neither DDP nor the optimizer would know them, and a clipped gradient would differ."""
    options = sections("Thawing", "rows", train={"clip": 0.1})
    for message in pool(2).run(runs.failed_sections, options):
        assert "got some that do so later: hidden.weight. To train them later, freeze" in message
