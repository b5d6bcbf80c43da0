"""A diagnosis is the same on any number of workers, and leaves the model as it was."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from tests.diagnose import cases


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _numbers(each, f"{path}/{name}")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _numbers(each, f"{path}/{index}")
    else:
        yield path, value


def differences(one: Any, other: Any) -> list[str]:
    first, second = dict(_numbers(one)), dict(_numbers(other))
    assert first.keys() == second.keys()
    return [
        f"{path}: {value} against {second[path]}"
        for path, value in first.items()
        if value != second[path]
        and not (
            isinstance(value, float)
            and isinstance(second[path], float)
            and math.isclose(value, second[path], rel_tol=1e-8, abs_tol=1e-10)
        )
    ]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        *(("pooled", parts) for parts in [(5,), (3, 2), (5, 0), (1, 0, 4)]),
        *((name, (1, 0, 4)) for name in ("local", "terms", "power")),
    ],
)
def test_one_worker_finds_what_three_find(pool, name, parts):
    if name == "local":
        parts = tuple(2 * n for n in parts)
    alone, is_same = cases.everything_of(parts, name)
    assert is_same
    for world_size in (2, 3) if parts == (3, 2) else (3,):
        for found, was_kept in pool(world_size).run(cases.everything_of, parts, name):
            assert was_kept
            assert differences(found, alone) == []
    assert sum(1 for _, value in _numbers(alone) if isinstance(value, float)) > 200


@pytest.mark.parametrize(
    "what",
    ["activations", "gradient", "evaluation loss", "activation gradients", "histograms", "surface"],
)
def test_a_sum_that_is_left_out_is_noticed(pool, what):
    alone, _ = cases.everything_of((3, 2), "pooled")
    found = pool(2).run(cases.everything_of, (3, 2), "pooled", what)
    assert any(differences(each, alone) for each, _ in found)


@pytest.mark.parametrize(
    ("what", "error"),
    [("model", "ValueError: too large"), ("part", "IndexError: index 3 is out of bounds")],
)
def test_a_failure_of_one_worker_is_raised_by_all(pool, what, error):
    for text in pool(3).run(cases.failing, what):
        assert f"got an error on rank 2: {error}" in text
        assert text.endswith(" 3")
