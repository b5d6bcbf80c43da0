"""A run is diagnosed alike by any number of workers, in the parts that its own workers had."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from syncnorm import SyncBatchNorm
from syncnorm.errors import ConfigError
from syncnorm.train.config.file import load_config
from syncnorm.train.finished.diagnose import diagnose_run
from syncnorm.train.finished.parts import plan_step
from syncnorm.train.task.supervised import Classify
from tests.diagnose.test_workers import differences
from tests.train import runs
from tests.train.test_loop import FEW, THIN

SMALL = [
    FEW,
    THIN,
    "train.epochs=1",
    "train.global_batch=40",
    "train.dtype=float64",
    "data.augment.crop=1",
]
# Each worker has half of the labels, and statistics of its own.
SHARDED = ["norm.sync=none", "data.regime=sharded_labels", "data.parts=2"]
VARIANTS = {
    "batch": [],
    "many norm batches": ["train.norm_batch=10"],
    "micro batches": ["norm.sync=none", "launch.micro_batch=10"],
    "running": ["norm.name=sync_batch_renorm", "norm.sync=running"],
    "lagged": ["norm.sync=lagged", "train.lr=0.03"],
    "torch": ["norm.name=batch_norm", "norm.sync=none"],
    "average": ["train.ema=0.9"],
}


def diagnosed(
    folder: str, overrides: list[str], only: list[str] | None, checkpoint: str = "newest"
) -> dict[str, Any]:
    """Diagnose a run of `train_digits`; without the seconds, which are each worker's own."""
    config = load_config("digits", overrides)
    found = diagnose_run(Path(folder), config, runs.workers(), checkpoint, 2, only, ("tests",))
    return {**asdict(found), "seconds": None}


def refused(folder: str, overrides: list[str], only: list[str]) -> str:
    try:
        diagnosed(folder, overrides, only)
    except ConfigError as error:
        return str(error)
    raise AssertionError("it was not refused")


@pytest.mark.parametrize("variant", VARIANTS)
def test_three_workers_find_what_one_finds(pool, tmp_path, variant):
    overrides = [*SMALL, *VARIANTS[variant]]
    folder = str(tmp_path / "run")
    pool(2).run(runs.train_digits, folder, overrides)
    only = ["statistics", "gradients", "shift"]
    (alone,) = pool(1).run(diagnosed, folder, overrides, only)
    for found in pool(3).run(diagnosed, folder, overrides, only):
        assert differences(found, alone) == []
    assert alone["workers"] == 2
    assert alone["batches"] == 2
    assert alone["samples"] == 40
    layers = alone["measures"]["statistics"]["layers"]
    assert len(layers) == 9
    smallest = {"many norm batches": 10, "micro batches": 10, "running": 20, "torch": 20}
    assert alone["measures"]["statistics"]["samples"] == smallest.get(variant, 40)
    for each in layers.values():
        assert each["is_pooled"] == (variant in ("batch", "lagged", "average") or "norm" in variant)
        assert 0 <= each["between_share"] < 0.3
    for each in alone["measures"]["gradients"]["layers"].values():
        if each["is_invariant"]:
            assert abs(each["cosine"]) < 1e-2
    invariant = [e["is_invariant"] for e in alone["measures"]["gradients"]["layers"].values()]
    assert sum(invariant) == (0 if variant == "lagged" else 9)


def test_every_measure_of_a_run(pool, tmp_path):
    folder = str(tmp_path / "run")
    pool(2).run(runs.train_digits, folder, SMALL)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (found,) = pool(1).run(diagnosed, folder, SMALL, None)
    names = ["statistics", "gradients", "smoothness", "shift", "covariate", "surface"]
    assert list(found["measures"]) == names
    assert found["step"] == 8
    assert found["measures"]["shift"]["layers"].popitem()[1]["gaussian"]["max"] > 0.01
    middle = {m: v[3][3] for m, v in found["measures"]["surface"]["modes"].items()}
    assert middle["batch"] == pytest.approx(found["measures"]["smoothness"]["loss"], rel=0.5)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_what_cannot_be_measured_is_refused_by_all(pool, tmp_path):
    folder = str(tmp_path / "run")
    pool(2).run(runs.train_digits, folder, SMALL)
    for text in pool(2).run(refused, folder, SMALL, ["colour"]):
        assert text.startswith("`only` must be some of statistics, gradients")


def _plan(model: nn.Module, workers: int, *overrides: str) -> list[list[int]]:
    """The sizes of the parts of each statistic, of a step of 40."""
    config = load_config("digits", [*SMALL, *overrides])
    task = Classify()
    plan = plan_step(config, model, task, workers, 40)
    taken = sorted(i for each in plan.statistics for cut in each.values() for i in range(40)[cut])
    assert taken == list(range(40))
    return [[cut.stop - cut.start for cut in each.values()] for each in plan.statistics]


def test_a_step_is_taken_apart_as_its_workers_had_it():
    pooled = SyncBatchNorm(3)
    assert _plan(pooled, 3) == [[14, 13, 13]]
    assert _plan(pooled, 2, "train.norm_batch=20") == [[20], [20]]
    assert _plan(pooled, 4, "train.norm_batch=20") == [[10, 10], [10, 10]]
    assert _plan(pooled, 3, "train.norm_batch=20") == [[7, 7, 6], [7, 7, 6]]
    local = SyncBatchNorm(3, sync="none")
    assert _plan(local, 3, "norm.sync=none") == [[14], [13], [13]]
    assert _plan(local, 2, "norm.sync=none", "launch.micro_batch=10") == [[10]] * 4
    # A layer of the user's own pools, whatever norm says.
    assert _plan(pooled, 2, "norm.name=batch_norm", "norm.sync=none") == [[20, 20]]


@pytest.mark.parametrize(
    ("overrides", "rules"),
    [
        (["norm.momentum=0.001"], ["running statistics"]),
        ([FEW, "train.global_batch=32", "train.norm_batch=4"], ["few samples"]),
        (SHARDED, ["running statistics"]),
        ([], []),
    ],
    ids=["small momentum", "small statistics", "sharded labels", "nothing"],
)
def test_advice_about_runs_whose_fault_is_known(pool, tmp_path, overrides, rules):
    folder, config = str(tmp_path / "run"), ["train.epochs=2", *overrides]
    pool(2).run(runs.train_digits, folder, config)
    only = ["statistics", "gradients", "smoothness"]
    for found in pool(2).run(diagnosed, folder, config, only):
        assert [each["rule"] for each in found["advice"]] == rules
