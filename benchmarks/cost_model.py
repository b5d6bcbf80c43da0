"""Time of the messages of a step: a latency for each round, and bytes over a bandwidth.

    time of a message = call + shortage (rounds latency + moved bytes * seconds per byte)

Rounds follow each other: a worker can send in one only after it has received in the one before. By
the number of workers W and the bytes m of a message:

    exchange             rounds       bytes moved by each worker
    all-reduce, ring     2 (W - 1)    2 m (W - 1) / W               gloo
    all-gather, ring     W - 1        m (W - 1)                     gloo; a sum that all read
    all-reduce, tree     2 log2 W     2 m (W - 1) / W               recursive halving and doubling
    all-gather, tree     log2 W       m (W - 1)                     recursive doubling

Where a machine has fewer cores than workers, these take turns: shortage = max(1, W / cores).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls


class Way(NamedTuple):
    """Rounds, and the share of a message's bytes that each worker moves, by number of workers."""

    rounds: Callable[[int], float]
    share: Callable[[int], float]


WAYS: dict[str, Way] = {
    "all-reduce, ring": Way(lambda w: 2 * (w - 1), lambda w: 2 * (w - 1) / w),
    "all-gather, ring": Way(lambda w: w - 1, lambda w: w - 1),
    "all-reduce, tree": Way(lambda w: 2 * math.log2(w), lambda w: 2 * (w - 1) / w),
    "all-gather, tree": Way(lambda w: math.log2(w), lambda w: w - 1),
}


class Link(NamedTuple):
    """The cost of a message, in seconds."""

    call: float
    """Once for each message, however many workers there are."""
    latency: float
    """For each round."""
    per_byte: float


class Traffic(NamedTuple):
    """What a worker sends in a training step."""

    messages: int
    bytes: int


class Timing(NamedTuple):
    """One measured exchange."""

    workers: int
    bytes: int
    seconds: float


def shortage(workers: int, cores: int | None) -> float:
    """Workers for each core, at least 1; None means a core for each worker.

    >>> shortage(8, 2), shortage(2, 2), shortage(1024, None)
    (4.0, 1.0, 1.0)
    """
    return 1.0 if cores is None else max(1.0, workers / cores)


def seconds(
    link: Link, way: str, traffic: Traffic, workers: int, cores: int | None = None
) -> float:
    """Time of the messages, one after the other, over one kind of link."""
    if workers == 1 or not traffic.messages:
        return 0.0
    rounds, share = WAYS[way]
    per_round = traffic.messages * rounds(workers) * link.latency
    moved = traffic.bytes * share(workers) * link.per_byte
    return traffic.messages * link.call + shortage(workers, cores) * (per_round + moved)


def seconds_on_two_levels(
    within: Link, between: Link, way: str, traffic: Traffic, workers: int, hosts: int
) -> float:
    """Time of sums that are made in each host, then between one worker of each, then published.

    In a host the workers send to one, which adds, and which answers each of them.
    """
    each = workers // hosts
    star = 2 * (each - 1) * (traffic.messages * within.latency + traffic.bytes * within.per_byte)
    return traffic.messages * within.call + star + seconds(between, way, traffic, hosts)


def fit(timings: Sequence[Timing], way: str, cores: int | None = None) -> tuple[Link, float]:
    """Fit a link to timings by least squares of relative errors, no part of it below zero.

    Returns:
        The link, and the root of the mean square of the relative errors.
    """
    rounds, share = WAYS[way]
    rows = []
    for workers, size, took in timings:
        slow = shortage(workers, cores) / took
        rows.append([1 / took, slow * rounds(workers), slow * share(workers) * size])
    matrix = np.array(rows)
    # The columns differ by many orders of magnitude.
    scale = np.linalg.norm(matrix, axis=0)
    solution, residual = nnls(matrix / scale, np.ones(len(rows)))
    return Link(*(solution / scale).tolist()), float(residual) / math.sqrt(len(rows))


def fit_best(
    timings: Sequence[Timing], ways: Sequence[str], cores: int | None = None
) -> tuple[str, Link, float]:
    """The way that the timings follow most closely, its link and the relative error."""
    fits = {way: fit(timings, way, cores) for way in ways}
    way = min(fits, key=lambda name: fits[name][1])
    return (way, *fits[way])


def of_torchs_layers(channels: Sequence[int]) -> Mapping[str, Traffic]:
    """What torch.nn.SyncBatchNorm sends in a step, in float32.

    A forward gathers mean, 1 / std and count of each worker, a backward sums two gradients.

    >>> of_torchs_layers([8])["all-gather"]
    Traffic(messages=1, bytes=68)
    """
    count = len(channels)
    return {
        "all-gather": Traffic(count, 4 * sum(2 * each + 1 for each in channels)),
        "all-reduce": Traffic(count, 4 * sum(2 * each for each in channels)),
    }
