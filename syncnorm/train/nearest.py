"""The nearest known name to one that is not known, for messages."""

from collections.abc import Sequence
from difflib import SequenceMatcher


def nearest(name: str, known: Sequence[str]) -> str:
    """Name the entry of `known` that `name` most likely stands for.

    Dotted names are compared as a whole and by their last part, so that `lrr` finds `train.lr`.
    """
    return max(known, key=lambda candidate: _likeness(name, candidate))


def _likeness(name: str, candidate: str) -> float:
    whole = SequenceMatcher(None, name, candidate).ratio()
    last = SequenceMatcher(None, name.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
    return whole + last
