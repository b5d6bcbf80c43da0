"""Random sequences of calls of both layers on three workers, compared with the oracle."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import pytest

from drills.fuzz import Runner, drill, first_failure, sequences, shorten
from drills.fuzz_calls import CALLS, Calls, draw_calls
from tests.as_device import as_device
from tests.distributed import planted

# As many as bring every kind of call 15 times; the drill plays more.
SEQUENCES = 60


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner() as runner:
        yield runner


def test_sequences_of_calls_equal_the_oracle(runner):
    tally = drill(runner, seed=0, count=SEQUENCES)
    assert tally.first is None, f"{tally.first.sequence}\n" + "\n".join(tally.first.problems)
    assert tally.calls == SEQUENCES * CALLS
    # A kind of call that never came would be a claim that nothing backs.
    missing = [kind for kind in KINDS if tally.kinds[kind] < 15]
    assert not missing


@pytest.mark.parametrize(("kernels", "count"), [("composed", 25), ("triton", 3)])
def test_and_on_the_course_of_a_device(runner, monkeypatch, kernels, count):
    drawn = list(sequences(seed=3, count=count))
    if kernels == "triton":
        pytest.importorskip("triton")
        drawn = [_without_bfloat16(each) for each in drawn]
    monkeypatch.setattr(runner, "plant", functools.partial(as_device, kernels))
    found = first_failure(runner, drawn)
    assert found is None, "\n".join([str(found.sequence), *found.problems])


def _without_bfloat16(sequence: Calls) -> Calls:
    """Triton's interpreter cuts digits off where a GPU rounds to bfloat16."""
    calls = [
        dataclasses.replace(call, dtype="float32") if call.dtype == "bfloat16" else call
        for call in sequence.calls
    ]
    return dataclasses.replace(sequence, calls=tuple(calls))


KINDS = [
    "train", "eval", "frozen", "float32", "float64", "bfloat16", "contiguous", "channels_last", "rows", "deepcopy",
    "no worker has "
    "samples", "a worker without samples", "masks on some workers only", "all weights zero",
    "inputs differ in "
    "requires_grad", "checkpoint, reentrant", "checkpoint, non-reentrant", "in an accumulate block",
    "gradients kept from "
    "before", "backward left for later", "backward one by one", "the batch before again",
    "layer: norm", "layer: renorm",
]  # fmt: skip


@pytest.mark.parametrize(
    ("plant", "trace"),
    [
        (planted.local_count, "gradient of the input"),
        (planted.narrow_wire, "running_"),
        (planted.unguarded_count, "nan"),
        (planted.counted_twice, "counter"),
    ],
)
def test_a_planted_defect_is_found_and_its_sequence_shortened(runner, monkeypatch, plant, trace):
    monkeypatch.setattr(runner, "plant", plant)
    found = first_failure(runner, list(sequences(seed=1, count=20)))
    assert found is not None
    shortest = shorten(runner, found)
    assert not shortest.is_hang
    assert len(shortest.sequence.calls) <= 2
    assert any(trace in problem for problem in shortest.problems)


def test_an_exchange_that_one_worker_leaves_out_is_found_and_ends_by_the_deadline():
    with Runner(planted.gated_exchange, timeout_seconds=10.0) as runner:
        found = first_failure(runner, list(sequences(seed=1, count=5)), together=1)
    assert found is not None
    assert found.is_hang


def test_the_same_seed_draws_the_same_sequences():
    assert list(sequences(3, 2)) == list(sequences(3, 2))
    assert dataclasses.replace(draw_calls(1), seed=2) != draw_calls(2)
