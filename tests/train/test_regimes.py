"""The order of the training samples by regime: which labels meet in a part of a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.utils.data import TensorDataset

from syncnorm.errors import ConfigError
from syncnorm.placement import epoch_order, shard
from syncnorm.train.config.file import load_config
from syncnorm.train.data.regimes import drifting, grouped, sharded, training_order
from syncnorm.train.data.sources import SOURCES
from syncnorm.train.data.splits import Splits
from syncnorm.train.header import describe_data
from syncnorm.train.setup import load_feed
from tests.train import runs
from tests.train.files import targets_of, write_csv, write_folder
from tests.train.test_loop import FEW, THIN, curve, run

REGIMES = {
    "iid": [],
    "label_groups": ["data.regime=label_groups", "data.parts=4", "data.part_labels=2"],
    "sharded_labels": ["data.regime=sharded_labels", "data.parts=4"],
    "drift": ["data.regime=drift"],
}


def labels_of(counts: list[int]) -> Tensor:
    """Labels 0, 1, ... of so many samples each, not in their order."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return labels[epoch_order(len(labels), 5, 5)]


def order_of(regime: str, labels: Tensor, epoch: int = 1, batch: int = 16, seed: int = 0) -> Tensor:
    config = load_config(
        "digits", [f"train.global_batch={batch}", f"train.seed={seed}", *REGIMES[regime]]
    )
    feed = SimpleNamespace(labels=labels, sizes={"train": len(labels)})
    return training_order(config, feed, epoch)  # pyright: ignore[reportArgumentType]


COUNTS = st.lists(st.integers(1, 60), min_size=2, max_size=7)


@given(regime=st.sampled_from(list(REGIMES)), counts=COUNTS, batch=st.sampled_from([8, 16, 64]))
def test_each_sample_comes_once_in_an_epoch(regime, counts, batch):
    labels = labels_of(counts)
    order = order_of(regime, labels, batch=batch)
    assert torch.equal(order.sort().values, torch.arange(len(labels)))


@pytest.mark.parametrize("regime", REGIMES)
def test_the_order_follows_from_seed_and_epoch(regime):
    labels = labels_of([30, 40, 50])
    first = order_of(regime, labels)
    assert torch.equal(first, order_of(regime, labels))
    assert not torch.equal(first, order_of(regime, labels, epoch=2))
    assert not torch.equal(first, order_of(regime, labels, seed=1))
    assert regime != "iid" or torch.equal(first, epoch_order(120, 0, 1))


def hold(parts: Tensor, wanted: int) -> bool:
    """Whether each row holds so many labels, equally often."""
    return all(
        row.unique(return_counts=True)[1].tolist() == [len(row) // wanted] * wanted for row in parts
    )


def whole_parts(order: Tensor, labels: Tensor, size: int) -> Tensor:
    return labels[order[: len(order) // size * size]].view(-1, size)


def test_groups_hold_their_number_of_labels_equally_often():
    labels = labels_of([40] * 5)
    order = order_of("label_groups", labels)
    assert hold(whole_parts(order, labels, 4), 2)
    # Any two labels meet, and the order of samples is not that of their numbers.
    pairs = {tuple(row.unique().tolist()) for row in whole_parts(order, labels, 4)}
    assert len(pairs) == 10
    assert not hold(whole_parts(epoch_order(200, 0, 1), labels, 4), 2)


@given(counts=COUNTS, kinds=st.integers(1, 3), length=st.integers(1, 5))
def test_groups_are_whole_until_too_few_labels_have_samples(counts, kinds, length):
    labels = labels_of(counts)
    group = kinds * length
    order = grouped(epoch_order(len(labels), 0, 1), labels, group, kinds)
    parts, blocks = whole_parts(order, labels, group), [count // length for count in counts]
    # As many as there are groups of different labels at the least: a label is in one only once.
    whole = next((n for n in range(len(parts)) if not hold(parts[n : n + 1], kinds)), len(parts))
    left = torch.bincount(labels[order[whole * group :]], minlength=len(counts))
    assert sum(int(n) >= length for n in left) < kinds
    assert whole <= sum(blocks) // kinds


def test_groups_go_through_labels_at_the_pace_of_their_numbers():
    """A frequent label is not used up before the others: halfway, half of each is gone."""
    counts = [400, 200, 200, 200]
    labels = labels_of(counts)
    order = grouped(epoch_order(1000, 0, 1), labels, 8, 2)
    half = torch.bincount(labels[order[:500]])
    assert all(abs(2 * got / count - 1) < 0.2 for got, count in zip(half.tolist(), counts))


@given(counts=COUNTS, parts=st.integers(2, 5), part=st.integers(1, 6))
def test_a_part_is_of_its_own_shard_for_good(counts, parts, part):
    labels, batch = labels_of(counts), parts * part
    seen: list[set[int]] = [set() for _ in range(parts)]
    for epoch in (1, 2):
        order = sharded(epoch_order(len(labels), 0, epoch), labels, batch, parts)
        for step in order.split(batch):
            for number, some in enumerate(parts_of(step, parts)):
                seen[number] |= set(some.tolist())
    # No sample is in two, and the labels of shards are in order, with one in common at most.
    assert sum(map(len, seen)) == len(labels)
    held = [labels[list(some)] for some in seen if some]
    for low, high in itertools.pairwise(held):
        assert low.max() <= high.min()


def parts_of(step: Tensor, parts: int) -> list[Tensor]:
    """What each of so many workers has of a step."""
    return [step[shard(len(step), number, parts)] for number in range(parts)]


def test_any_order_is_not_sharded():
    """With as many shards as labels each part has one label; in any order it has several."""
    labels, order = labels_of([40] * 5), epoch_order(200, 0, 1)
    held = {
        name: [len(labels[some].unique()) for step in each.split(50) for some in parts_of(step, 5)]
        for name, each in (("sharded", sharded(order, labels, 50, 5)), ("any", order))
    }
    assert set(held["sharded"]) == {1}
    assert min(held["any"]) > 1


def test_labels_arrive_one_after_the_other():
    labels = labels_of([100, 20, 50, 100, 30])
    order = drifting(epoch_order(300, 0, 1), labels)
    place = torch.empty(300)
    place[order] = torch.arange(300.0)
    means = [place[labels == label].mean().item() for label in range(5)]
    assert means == sorted(means)
    first, last = labels[order[:60]], labels[order[-60:]]
    assert set(first.tolist()) <= {0, 1, 2}
    assert set(last.tolist()) <= {2, 3, 4}
    # Those of one label are in any order.
    mine = order[labels[order] == 0]
    assert not torch.equal(mine, mine.sort().values)


def test_one_label_is_no_drift_to_speak_of():
    assert torch.equal(
        drifting(epoch_order(9, 0, 1), torch.zeros(9, dtype=torch.int64)), epoch_order(9, 0, 1)
    )


EXACT = [
    FEW,
    THIN,
    "train.dtype=float64",
    "train.global_batch=72",
    "train.epochs=2",
    "train.lr=0.02",
]
LOCAL = "train.norm_batch=18"


# The number of workers on which each is tried in a short run of the tests.
FAST = {"label_groups": 4, "sharded_labels": 3, "drift": 3}


@pytest.fixture(scope="module")
def alone(pool, tmp_path_factory) -> Callable[[str], list[float]]:
    """alone(regime): the curve of a run on one worker, made once."""
    made: dict[str, list[float]] = {}

    def get(regime: str) -> list[float]:
        if regime not in made:
            folder = tmp_path_factory.mktemp("alone")
            run(pool, 1, folder, [*EXACT, *REGIMES[regime], LOCAL])
            made[regime] = curve(folder)
        return made[regime]

    return get


@pytest.mark.parametrize(
    ("regime", "world_size"),
    [
        pytest.param(regime, size, marks=[] if size == FAST[regime] else [pytest.mark.slow])
        for regime in FAST
        for size in (2, 3, 4)
    ],
)
def test_the_run_is_the_same_on_any_number_of_workers(pool, alone, tmp_path, regime, world_size):
    """With statistics of each part, and steps of 72 samples, of which every fifth has 29."""
    run(pool, world_size, tmp_path, [*EXACT, *REGIMES[regime], LOCAL])
    assert curve(tmp_path) == pytest.approx(alone(regime), rel=1e-11)
    assert len(alone(regime)) == 10


def test_a_regime_changes_the_run(alone):
    assert len({tuple(alone(regime)) for regime in REGIMES}) == len(REGIMES)


@pytest.mark.parametrize("regime", FAST)
def test_a_stopped_run_goes_on_with_the_same_samples(pool, alone, tmp_path, regime):
    options = [*EXACT, *REGIMES[regime], LOCAL]
    run(pool, 2, tmp_path, options, stop_at=7)
    run(pool, 2, tmp_path, options)
    assert curve(tmp_path) == pytest.approx(alone(regime), rel=1e-11)
    resumed = [event["resumed_from"] for event in runs.events(tmp_path, "start")]
    assert resumed == [None, "step-00000007"]


@pytest.mark.parametrize(("regime", "end"), [("iid", "per epoch"), ("drift", ", regime drift")])
def test_the_first_lines_say_the_order(regime, end):
    config = load_config("digits", REGIMES[regime])
    feed = load_feed(config, CPU)
    line = describe_data(SimpleNamespace(config=config), feed)  # pyright: ignore[reportArgumentType]
    assert line.endswith(end)


def test_parts_are_as_many_as_statistics_unless_given():
    options = ["train.global_batch=64", "data.regime=sharded_labels"]
    assert load_config("digits", [*options, "train.norm_batch=16"]).parts == 4
    assert load_config("digits", [*options, "data.parts=8"]).parts == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.parts=4"], "parts must be null with regime iid, got 4"),
        (["data.part_labels=4"], "part_labels must be null with regime iid, got 4"),
        (["data.regime=label_groups"], "part_labels must be a number with regime label_groups"),
        (["data.regime=sharded_labels"], "`data.parts` must be at least 2"),
        (["data.regime=sharded_labels", "data.parts=5"], "divisor of train.global_batch = 64, got"),
        (
            ["data.regime=label_groups", "data.parts=4", "data.part_labels=3"],
            "`data.part_labels` must be a divisor of the 16 samples in a part of a step, got 3",
        ),
    ],
)
def test_keys_that_do_not_fit_are_refused(options, message):
    with pytest.raises((ConfigError, ValidationError), match=message):
        load_config("digits", ["train.global_batch=64", *options])


def test_too_few_labels_are_refused_by_all(pool):
    options = ["data.regime=label_groups", "data.part_labels=16", "train.norm_batch=16"]
    (message, other) = pool(2).run(runs.refused, [*options, "train.global_batch=64"])
    assert message == other
    assert "at most the number of labels in the training set, 10, got 16" in message


def nameless(root, **options) -> Splits:
    """Samples whose labels are seen only by reading them; the option gives them, or `targets`."""
    data = TensorDataset(torch.randn(12, 1, 8, 8), torch.arange(12) % 3)
    return Splits(data, num_classes=3, in_channels=1, **options)


def targeted(root) -> Splits:
    splits = nameless(root)
    splits.train.targets = [n % 3 for n in range(12)]  # pyright: ignore[reportAttributeAccessIssue]
    return splits


def test_labels_that_are_not_known_are_refused():
    options = [*REGIMES["sharded_labels"], "train.global_batch=8"]
    place = "data.name=tests.train.test_regimes"
    with pytest.raises(ConfigError, match=r"`data.regime` must be iid where .*got sharded_labels"):
        load_feed(load_config("digits", [*options, f"{place}:nameless"]), CPU, ("tests",))
    feed = load_feed(load_config("digits", [*options, f"{place}:targeted"]), CPU, ("tests",))
    assert feed.labels is not None
    assert feed.labels.tolist() == [n % 3 for n in range(12)]
    with pytest.raises(ConfigError, match="one for each of 12 training samples, got a list of 2"):
        load_feed(
            load_config("digits", [*options, f"{place}:nameless", "data.options.labels=[1, 2]"]),
            CPU,
            ("tests",),
        )


def test_labels_are_those_of_the_samples_that_are_left():
    labels = list(range(12))
    splits = nameless(None, labels=labels).hold_out(0.25)
    kept = splits.known_labels()
    assert kept is not None
    assert len(kept) == 9
    assert splits.hold_out(0.5).known_labels() is kept  # it has a validation set already


def test_labels_of_files_are_known(tmp_path):
    """Those of images in folders, of arrays and of a table, as each sample has them."""
    write_folder(tmp_path / "folder", ["b/1.png", "a/1.png", "b/2.png"])
    arrays = {"x_train": np.random.rand(4, 2, 3), "y_train": np.array([2, 0, 1, 2])}
    np.savez(tmp_path / "some.npz", x_train=arrays["x_train"], y_train=arrays["y_train"])
    (tmp_path / "npy").mkdir()
    for name, array in arrays.items():
        np.save(tmp_path / "npy" / f"{name}.npy", array)
    write_csv(tmp_path / "some.csv", [["x", "target"], [1, "dog"], [2, "cat"], [3, "dog"]])
    found = [
        SOURCES["folder"](tmp_path / "folder", size=4),
        SOURCES["npz"](tmp_path / "some.npz"),
        SOURCES["npy"](tmp_path / "npy"),
        SOURCES["csv"](tmp_path / "some.csv", target="target"),
    ]
    for splits, wanted in zip(found, ([0, 1, 1], [2, 0, 1, 2], [2, 0, 1, 2], [1, 0, 1])):
        labels = splits.known_labels()
        assert labels is not None
        assert labels.tolist() == wanted == [int(target) for target in targets_of(splits.train)]


def test_targets_that_are_no_labels_are_none_that_are_known(tmp_path):
    np.savez(tmp_path / "some.npz", x_train=np.random.rand(4, 2, 3), y_train=np.random.rand(4))
    assert SOURCES["npz"](tmp_path / "some.npz").known_labels() is None


CPU = torch.device("cpu")
