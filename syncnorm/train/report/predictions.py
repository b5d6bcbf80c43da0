"""The record of a classifier's last predictions, as the page shows it; the file may be anybody's."""

import re
from dataclasses import dataclass
from typing import Any, TypeGuard

# What this package writes, and nothing that names an address.
_IMAGE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]{1,12000}={0,2}")
MOST_CLASSES, MOST_PAIRS, SHOWN_WRONG, SHOWN_RIGHT = 32, 64, 12, 4
_LARGEST = 10**12


@dataclass(frozen=True)
class Sample:
    """A sample of the set.

    Args:
        true: its class.
        predicted: the class that it was taken for.
        share: the probability that the network gave that.
        image: a data URI; None for what is no image.
    """

    true: int
    predicted: int
    share: float
    image: str | None


@dataclass(frozen=True)
class Predictions:
    """The last predictions of a run.

    Args:
        split: of the data.
        count: number of samples.
        matrix: counts by class and prediction; empty where there are many classes.
        confused: most frequent mistakes as (class, prediction, count), where there are many.
        samples: some of them.
    """

    split: str
    count: int
    matrix: list[list[int]]
    confused: list[tuple[int, int, int]]
    samples: list[Sample]

    def share(self, true: int, predicted: int) -> float:
        """The share of a class's samples that were taken for another, or for itself."""
        return self.matrix[true][predicted] / max(1, sum(self.matrix[true]))


def read_predictions(event: dict[str, Any]) -> Predictions | None:
    """Read the event; None if it is none that this package writes."""
    split, count = event.get("split"), event.get("count")
    if split not in ("validation", "test") or not _is_count(count):
        return None
    samples = map(_sample, _list(event.get("samples"))[: SHOWN_WRONG + SHOWN_RIGHT])
    return Predictions(
        split,
        count,
        _matrix(event.get("confusion")),
        [
            (true, predicted, number)
            for true, predicted, number in filter(_is_triple, _list(event.get("confused")))
        ][:MOST_PAIRS],
        [sample for sample in samples if sample is not None],
    )


def _matrix(value: Any) -> list[list[int]]:
    rows = _list(value)
    is_matrix = all(
        isinstance(row, list) and len(row) == len(rows) and all(map(_is_count, row)) for row in rows
    )
    return rows if is_matrix and len(rows) <= MOST_CLASSES else []


def _sample(value: Any) -> Sample | None:
    if not isinstance(value, dict):
        return None
    true, predicted, share = (value.get(key) for key in ("class", "predicted", "share"))
    if not (_is_count(true) and _is_count(predicted)):
        return None
    image = value.get("image")
    is_image = isinstance(image, str) and _IMAGE.fullmatch(image)
    sure = float(share) if isinstance(share, int | float) and 0 <= share <= 1 else 0.0
    return Sample(true, predicted, sure, image if is_image else None)


def _is_triple(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_count, value))


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _LARGEST


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
