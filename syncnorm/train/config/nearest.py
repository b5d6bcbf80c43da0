"""The nearest known name to one that is not known, for messages."""

from collections.abc import Sequence
from difflib import SequenceMatcher


def nearest(name: str, known: Sequence[str]) -> str:
    """Name the entry of `known` that `name` most likely stands for.

    Dotted names are compared as a whole and by their last part, so that `lrr` finds `train.lr`.
    """
    start = name[
        :100
    ].lower()  # the comparison takes time that grows with the product of the lengths
    return max(known, key=lambda candidate: _likeness(start, candidate.lower()))


def _likeness(name: str, candidate: str) -> float:
    whole = SequenceMatcher(None, name, candidate).ratio()
    last = SequenceMatcher(None, name.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
    return whole + last
