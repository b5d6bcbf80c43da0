"""ResNet-18 on uneven shards under DistributedDataParallel trains as on the whole batch."""

from __future__ import annotations

import pytest
import torch

from tests.model.curves import batches, sharded, train

STEPS, SIZE = 20, 9
# A split for each type: neither depends on the other. test_fuzz.py has many more.
TWO, THREE = (6, 3), (2, 6, 1)


@pytest.fixture(scope="module")
def whole() -> list[float]:
    return train(batches(STEPS, SIZE, torch.float64), (SIZE,), "batch")


def test_float64_equals_the_unsharded_run(pool, whole):
    curve = sharded(pool(2), batches(STEPS, SIZE, torch.float64), TWO, "batch")
    assert curve == pytest.approx(whole, rel=1e-10)
    assert whole[-1] < 0.5 * whole[0], "the run must go somewhere"


def test_local_statistics_are_another_training(pool, whole):
    """The negative control."""
    curve = sharded(pool(2), batches(2, SIZE, torch.float64), TWO, "none")
    assert curve[1] != pytest.approx(whole[1], rel=1e-3)


def float32_whole() -> tuple[list[float], list[float]]:
    """The unsharded curve, and how far a change of one weight by one ulp has led it astray by each
    step.
    """
    data = batches(STEPS, SIZE, torch.float32)
    curve = train(data, (SIZE,), "batch")
    control = [0.0] * STEPS
    for which in (1, 2, 3):
        nudged = train(data, (SIZE,), "batch", ulps=which)
        control = [max(c, abs(a - b)) for c, a, b in zip(control, nudged, curve, strict=True)]
    return curve, [max(control[: i + 1]) for i in range(STEPS)]


def test_float32_differs_no_more_than_four_times_one_ulp(pool):
    whole, control = float32_whole()
    curve = sharded(pool(3), batches(STEPS, SIZE, torch.float32), THREE, "batch")
    for step in (0, 9, 19):
        # At step 1 a nudge of one weight may leave the loss as it is: there, two ulps of the loss
        # are allowed.
        bound = max(4 * control[step], 2.4e-7 * abs(whole[step]))
        assert abs(curve[step] - whole[step]) <= bound, (
            f"step {step + 1}, control {control[step]:.3g}"
        )
