"""Arithmetic of a benchmark, against values by hand."""

from __future__ import annotations

import pytest
import torch

from syncnorm.bench import paired
from syncnorm.bench.candidates import LOCAL, Candidate
from syncnorm.bench.cases import Case, cases
from syncnorm.bench.memory import peak_bytes
from syncnorm.bench.report import summarise
from syncnorm.bench.worker import COPY, Prepared
from syncnorm.errors import ConfigError


def test_the_ratio_is_the_median_of_the_rounds_with_an_interval_of_order_statistics():
    of = [3.0, 1.0, 4.0, 2.0, 5.0, 9.0, 7.0, 8.0, 6.0]
    # reach = int(0.98 * 3) + 1 = 3 about the fifth of nine
    assert paired.ratio(of, [2.0] * 9) == (2.5, 1.0, 4.0)
    # Paired: the ratio of the medians would be 1.
    assert paired.ratio([1.0, 2.0, 3.0], [2.0, 3.0, 1.0]).median == pytest.approx(2 / 3)
    assert paired.ratio([3.0], [2.0]) == (1.5, 1.5, 1.5)
    assert str(paired.Ratio(1.0, 0.976, 1.234)) == "1.00 [0.98, 1.23]"


def test_the_interval_covers_the_median_in_95_of_100_samples():
    g = torch.Generator().manual_seed(0)
    samples = torch.randn(2000, 31, generator=g).exp()
    found = [paired.ratio(row.tolist(), [1.0] * 31) for row in samples]
    covered = sum(low <= 1.0 <= high for _, low, high in found) / len(found)
    assert 0.94 <= covered <= 0.99


def test_candidates_take_turns_in_an_order_that_rotates():
    order: list[str] = []
    turns = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = paired.rounds(
        turns, 3, warm_up=1, goes_on=lambda done: done < 2, line_up=lambda: order.append("|")
    )
    assert "".join(order) == "|a|b|c" + "|b|c|a" + "|c|a|b"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_bytes_per_second_are_five_times_the_input_against_a_copys_two():
    case = Case((2, 3, 4, 5))  # 480 bytes of float32
    local, ours = Candidate(LOCAL), Candidate("sync=batch")
    seconds = {"local": [1.0] * 6, "sync=batch": [2.0] * 6, COPY: [0.1] * 6}
    prepared = {local: Prepared(0, 0), ours: Prepared(2, 64)}
    found = summarise(case, 7, seconds, prepared, {"local": 9})
    assert (found.calls, found.rounds, found.copy_bytes_per_second) == (7, 6, 960 / 0.1)
    result = found.results[1]
    assert result.to_local is not None
    assert (result.to_local.median, result.bytes_per_second) == (2.0, 2400 / 2.0)
    assert result.of_copy is not None
    assert result.of_copy.median == pytest.approx((2400 / 2.0) / (960 / 0.1))
    assert (result.messages, result.message_bytes, result.peak_bytes) == (2, 64, None)
    assert found.results[0].peak_bytes == 9


def test_the_peak_counts_what_a_step_holds_at_once():
    def step() -> None:
        for _ in range(3):
            a = torch.empty(1000, dtype=torch.float64)
            del a
        b, c = torch.empty(500, dtype=torch.float64), torch.empty(1000, dtype=torch.float64)
        del b, c

    assert peak_bytes(step, "cpu") == 12_000
    assert peak_bytes(lambda: None, "cpu") is None


def test_cases_are_chosen_by_parts_of_their_names():
    every = cases(4, "cpu")
    assert len(every) == len({case.name for case in every}) == 2 * (12 + 2 + 1) + 1 + 2
    names = [case.name for case in cases(4, "cpu", ["resnet18", "x8x8"])]
    assert names == ["model resnet18 4x3x64x64", "layer 8x64x8x8", "layer 8x64x8x8 channels last"]
    with pytest.raises(ConfigError, match=r"`--case` must be part .* got 'resnet19'"):
        cases(4, "cpu", ["resnet18", "resnet19"])
