"""Cases of several choices that hardly act on each other: every two values meet in one of them.

The whole product is there for `make test-slow`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pytest


def covering(together: Collection[str] = (), /, **choices: Sequence[Any]) -> tuple[list[str], list]:
    """The arguments of `pytest.mark.parametrize`: all cases, those marked slow that show no more.

    Args:
        together: names of choices that do act on each other: every combination of their values is
            in a case that is not slow. Else every two values of all choices are.
        choices: the values of each.
    """
    names = list(choices)
    sets = [(a, b) for a, b in itertools.combinations(names, 2) if {a, b} - set(together)]
    if together:
        sets.append(tuple(together))
    product = list(itertools.product(*(range(len(values)) for values in choices.values())))
    places = [[names.index(name) for name in each] for each in sets]
    chosen = set(_chosen(product, places))
    cases = []
    for case in product:
        values = [choices[name][number] for name, number in zip(names, case, strict=True)]
        cases.append(pytest.param(*values, marks=[] if case in chosen else [pytest.mark.slow]))
    return names, cases


def _chosen(product: list[tuple[int, ...]], places: list[list[int]]) -> Iterator[tuple[int, ...]]:
    """Cases that have all combinations at these places: each time the first one with the most."""

    def combinations(case: tuple[int, ...]) -> set[tuple]:
        return {(n, *(case[i] for i in at)) for n, at in enumerate(places)}

    of_case = {case: combinations(case) for case in product}
    missing = set().union(*of_case.values())
    most = len(places)
    while missing:
        for case, has in of_case.items():
            if len(has & missing) >= most:
                yield case
                missing -= has
        most -= 1
