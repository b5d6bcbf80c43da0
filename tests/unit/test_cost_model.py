"""The model of the messages' time against hand values; its fit; its counts against messages made."""

from __future__ import annotations

import pytest

from benchmarks import cost_model, scaling_rank
from benchmarks.cost_model import Link, Timing, Traffic

LINK = Link(call=100.0, latency=10.0, per_byte=1.0)
STEP = Traffic(messages=3, bytes=40)


@pytest.mark.parametrize(
    ("way", "workers", "cores", "seconds"),
    [
        # 3 * 100 for the calls; then 3 messages * rounds * 10, and 40 bytes * share.
        ("all-reduce, ring", 4, None, 300 + 3 * 6 * 10 + 40 * 1.5),
        ("all-gather, ring", 4, None, 300 + 3 * 3 * 10 + 40 * 3),
        ("all-reduce, tree", 4, None, 300 + 3 * 4 * 10 + 40 * 1.5),
        ("all-gather, tree", 8, None, 300 + 3 * 3 * 10 + 40 * 7),
        ("all-reduce, ring", 4, 2, 300 + 2 * (3 * 6 * 10 + 40 * 1.5)),
        ("all-reduce, ring", 2, 4, 300 + 3 * 2 * 10 + 40 * 1),
        ("all-gather, ring", 1, None, 0),
    ],
)
def test_seconds_by_hand(way, workers, cores, seconds):
    assert cost_model.seconds(LINK, way, STEP, workers, cores) == pytest.approx(seconds)
    assert cost_model.seconds(LINK, way, Traffic(0, 0), workers, cores) == 0


def test_two_levels_by_hand():
    wire = Link(call=1000.0, latency=500.0, per_byte=7.0)
    # 8 workers in 2 hosts: 2 * 3 messages of a star, then a ring of 2 hosts.
    star = 300 + 6 * (3 * 10 + 40 * 1)
    ring = 3 * 1000 + 3 * 2 * 500 + 40 * 7
    way = "all-reduce, ring"
    assert cost_model.seconds_on_two_levels(LINK, wire, way, STEP, 8, 2) == star + ring
    assert cost_model.seconds_on_two_levels(LINK, wire, way, STEP, 4, 1) == star


@pytest.mark.parametrize("way", list(cost_model.WAYS))
def test_a_fit_recovers_the_link(way):
    link = Link(call=2e-5, latency=3e-5, per_byte=1e-9)
    timings = [
        Timing(w, size, cost_model.seconds(link, way, Traffic(1, size), w, cores=2))
        for w in (2, 3, 4)
        for size in (1000, 10_000, 1_000_000)
    ]
    found, error = cost_model.fit(timings, way, cores=2)
    assert found == pytest.approx(link, rel=1e-6)
    assert error < 1e-6
    assert cost_model.fit_best(timings, list(cost_model.WAYS), cores=2)[0] == way
    # Without a call's cost in what is fitted, none is found, rather than one below zero.
    free = [t._replace(seconds=t.seconds - 2.1e-5) for t in timings]
    fitted = cost_model.fit(free, way, cores=2)[0]
    assert min(fitted) >= 0
    assert fitted.per_byte > 0


def test_torchs_layers_by_hand():
    assert cost_model.of_torchs_layers([8, 16]) == {
        "all-gather": Traffic(2, 4 * (17 + 33)),
        "all-reduce": Traffic(2, 4 * (16 + 32)),
    }


@pytest.mark.parametrize("workers", [2, 4])
def test_messages_are_as_many_and_as_large_as_explain_says(pool, workers):
    counts = pool(workers).run(scaling_rank.counted)
    assert counts == [counts[0]] * workers
    assert list(counts[0]) == list(scaling_rank.SYNCS)
    for sync, (said, made) in counts[0].items():
        assert said == made, sync
        assert (made.messages > 0) == (sync != "none")
    layers = len(scaling_rank.WIDTHS)
    assert counts[0]["batch"][1].messages == 2 * layers
    assert counts[0]["lagged"][1].messages == 2
    assert counts[0]["running"][1].messages == 1
