"""benchmarks/invariance.py, in small: one curve on any number of workers, within tight bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks import invariance
from benchmarks.invariance import LAYERS, Job

# 301 = 7 * 40 + 21, so the eighth step is short: shards of it differ in size on 2 and 4 workers, of
# the others on 3.
SHORT = Job(
    ["train.epochs=2", "train.lr=0.05", "train.global_batch=40", "train.dtype=float64"],
    samples=301,
    steps=9,
)
SMOOTH = SHORT.but("train.dtype=float32")._replace(is_smooth=True)
# Samples in a statistic, and on how many workers beside one they are tried.
SIZES = {40: (2, 3, 4), 20: (4,), 5: (3,)}


@pytest.fixture(scope="module")
def losses(pool) -> Callable[[int, Job], list[float]]:
    """losses(world_size, job): of each step; each run is made once."""
    made: dict[str, list[float]] = {}

    def get(world_size: int, job: Job) -> list[float]:
        name = f"{world_size} {job}"
        if name not in made:
            first, *others = pool(world_size).run(invariance.train, job)
            assert all(other == first for other in others)
            made[name] = first.losses
        return made[name]

    return get


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_curve_is_that_of_one_worker(losses, layer, size):
    job = SHORT.but(*LAYERS[layer], f"train.norm_batch={size}")
    expected = losses(1, job)
    for world_size in SIZES[size]:
        assert max(invariance.gaps(losses(world_size, job), expected)) <= invariance.FLOAT64_BOUND
    assert expected[-1] < 0.8 * expected[0], "the run must go somewhere"


@pytest.mark.parametrize("layer", LAYERS)
def test_one_after_the_other_is_the_same_as_side_by_side(losses, layer):
    job = SHORT.but(*LAYERS[layer], "train.norm_batch=5")
    expected = losses(1, job)
    for world_size in (1, 3):
        serial = losses(world_size, job.but("launch.micro_batch=5"))
        assert max(invariance.gaps(serial, expected)) <= invariance.FLOAT64_BOUND


def test_in_float32_the_curves_stay_together_where_no_relu_parts_them(losses):
    expected = losses(1, SMOOTH)
    for world_size in (2, 3):
        gaps = invariance.gaps(losses(world_size, SMOOTH), expected)
        assert 0 < max(gaps) <= invariance.SMOOTH_BOUND


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, ["train.norm_batch=20"]),
        (2, ["norm.sync=none"]),
        (2, ["train.seed=1"]),
        (1, ["norm.name=sync_batch_renorm"]),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("job", "bound"), [(SHORT, invariance.FLOAT64_BOUND), (SMOOTH, invariance.SMOOTH_BOUND)]
)
def test_another_training_misses_the_bounds(losses, job, bound, world_size, options):
    """The negative control."""
    expected = losses(1, job)
    assert max(invariance.gaps(losses(world_size, job.but(*options)), expected)) > 10 * bound


def test_the_control_is_the_most_that_any_nudge_did_so_far():
    half_ulp = 2**-24
    assert invariance.control([[0.0, 3e-6, 0.0], [0.0, 1e-6, 2e-6]]) == [half_ulp, 3e-6, 3e-6]
    assert invariance.worst_ratio([half_ulp, 9e-6, 6e-6], [half_ulp, 3e-6, 3e-6], (1, 3)) == (
        2.0,
        3,
    )


GOOD = invariance.Row(
    "batch renorm", "104", [0.1, 0.2], [1e-15, 9e-13], [[4e-6] * 100] * 2, [1e-6, 9e-6], [0.9] * 3
)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "holds"),
        ({"wide": [1e-15, 2e-12]}, "MISSED"),
        ({"narrow": [[4e-6] * 100, [4e-6] * 99 + [5e-6]]}, "MISSED"),
        ({"smooth": [2e-4, 1e-6]}, "MISSED"),
        ({"clipped": [1.0, 0.2]}, "MISSED"),
        ({"clipped": [0.1, 0.0]}, "MISSED"),
        ({"layer": "batch norm", "clipped": [0.0, 0.0]}, "holds"),
    ],
    ids=str,
)
def test_a_missed_bound_is_told(capsys, changes, verdict):
    holds = invariance.compare("digits", GOOD._replace(**changes), [1e-6] * 100)
    assert capsys.readouterr().out.endswith(f"| 90.0 / 90.0 / 90.0 | {verdict} |\n")
    assert holds == (verdict == "holds")
