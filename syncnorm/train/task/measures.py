"""Metrics of an evaluation, added up over batches and workers."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from syncnorm.errors import ConfigError
from syncnorm.train.task import Number, Share
from syncnorm.train.waiting import from_all

_SHARES = ("accuracy", "f1", "iou", "match", "precision", "recall")


class Measures:
    """Sums and counts of an evaluation."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, metrics: Mapping[str, Share]) -> None:
        """Add those of a batch.

        Raises:
            ConfigError: they are no sums and counts.
        """
        check_metrics(metrics)
        for name, share in metrics.items():
            total, count = (_as_sum(number) for number in share)
            if name in self._sums:
                before = self._sums[name]
                total, count = before[0] + total, before[1] + count
            self._sums[name] = (total, count)

    def gather(self) -> dict[str, float]:
        """Compute each metric over all workers; those whose count is 0 are NaN.

        *Collectives*: one gathering of sums and counts; every worker must call. The result has the
        same bits on all.

        Raises:
            ConfigError: workers measured different metrics; on all workers.
        """
        everyone = from_all(
            {name: [_numbers(part) for part in share] for name, share in self._sums.items()}
        )
        # A worker without a sample has measured nothing.
        measured = [each for each in everyone if each]
        layouts = {
            tuple((name, len(share[0])) for name, share in each.items()) for each in measured
        }
        if len(layouts) > 1:
            raise ConfigError(
                "`task.name` must give the same metrics for every batch, got different ones on "
                f"workers: {'; '.join(sorted(map(str, layouts)))}"
            )
        return {
            name: _quotient([each[name] for each in measured])
            for name in (measured[0] if measured else {})
        }


def check_metrics(metrics: Any) -> None:
    """Refuse what is not a mapping from names to sums and counts.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
        raise ConfigError(
            "`task.name` must give metrics as a mapping from names to (sum, count), got a "
            f"{type(metrics).__name__}"
        )
    for name, share in metrics.items():
        is_pair = isinstance(share, tuple | list) and len(share) == 2
        if not is_pair or not all(isinstance(part, Tensor | int | float) for part in share):
            raise ConfigError(
                f"`task.name` must give metric {name!r} as a sum and its count, got {share!r:.80}"
            )
        total, count = map(torch.as_tensor, share)
        if total.ndim > 1 or total.shape != count.shape:
            raise ConfigError(
                f"`task.name` must give metric {name!r} as sums and counts of one shape, () or "
                f"(K,), got {tuple(total.shape)} and {tuple(count.shape)}"
            )


def format_metric(name: str, value: float) -> str:
    """Write a metric for people, such as `accuracy 98.89 %`."""
    return f"{name.replace('_', ' ')} {format_value(name, value)}"


def describe_metrics(metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Write a line for each metric of each split; the one that decides is the last of its split."""
    return [
        f"{split} {format_metric(name, value)}"
        for split, each in metrics.items()
        for name, value in reversed(list(each.items()))
    ]


def format_value(name: str, value: float) -> str:
    """Write the value of a metric for people, a share in per cent."""
    return f"{100 * value:.2f} %" if is_share(name) and 0 <= value <= 1 else f"{value:.4g}"


def is_share(name: str) -> bool:
    """Return True for metrics that are shares of 1, shown in per cent."""
    return name.endswith(_SHARES)


def _as_sum(number: Number) -> Tensor:
    value = torch.as_tensor(number).detach()
    return value.double() if value.is_floating_point() else value.long()


def _numbers(part: Tensor) -> list[float]:
    return part.reshape(-1).tolist()


def _quotient(shares: list[list[list[float]]]) -> float:
    """Divide the sums by the counts, and take the mean of the quotients that there are."""
    totals, counts = (
        [math.fsum(column) for column in zip(*(share[part] for share in shares), strict=True)]
        for part in (0, 1)
    )
    quotients = [total / count for total, count in zip(totals, counts, strict=True) if count]
    return math.fsum(quotients) / len(quotients) if quotients else math.nan
