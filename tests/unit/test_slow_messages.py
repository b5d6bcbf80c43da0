"""A message that `benchmarks.slow_messages` delays is late for who asks at once, and for nobody else."""

from __future__ import annotations

import time
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks import slow_messages
from syncnorm.comm import exchange, groups

DELAY_SECONDS = 50.0


def slept() -> tuple[list[float], list[float], list[float]]:
    """On a worker: sums, and the sleeps of an exchange waited for at once, and of one much later."""
    group = groups.statistics_group(None)
    naps: list[float] = []
    ahead = 0.0
    clock = SimpleNamespace(sleep=naps.append, perf_counter=lambda: time.perf_counter() + ahead)
    message = torch.ones(3, dtype=torch.float64)
    with (
        mock.patch.object(slow_messages, "time", clock),
        slow_messages.late_sums(lambda: DELAY_SECONDS),
    ):
        total = exchange.sum_(message, group, "moments")
        at_once = naps.copy()
        naps.clear()
        late = dist.all_reduce(message, async_op=True)
        late.prompt.wait()
        late.note()
        ahead = DELAY_SECONDS
        late.wait()
    return total.tolist() + message.tolist(), at_once, naps


def test_a_delay_holds_up_who_waits_and_not_who_comes_later(pool):
    for sums, at_once, later in pool(2).run(slept):
        assert sums == [2.0] * 6
        assert len(at_once) == 1
        assert 0 < at_once[0] <= DELAY_SECONDS
        assert later == []
