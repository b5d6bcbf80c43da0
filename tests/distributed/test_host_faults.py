"""Groups whose members are on several hosts: one error on all, whatever one of them does."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm import debug, undocumented
from syncnorm.comm import exchange, groups, hosts
from syncnorm.comm.groups import Group
from syncnorm.errors import ExchangeError
from syncnorm.run.failures import is_peer_loss
from syncnorm.testing import RankFailure, RankPool
from tests import ways
from tests.distributed.on_hosts import WORLD, group_of, say

pytestmark = pytest.mark.skipif(ways.refusal() != "", reason=ways.refusal())


def _different(odd: int, size: int, name: str) -> str:
    group = group_of("aabb")
    if dist.get_rank() == odd:
        message, label = torch.ones(size, dtype=torch.float64), name
    else:
        message, label = torch.ones(3, dtype=torch.float64), "a"
    exchange.make_room(group, 60)
    with pytest.raises(ExchangeError) as caught:
        exchange.sum_(message, group, "moments", label)
    after = exchange.sum_(torch.ones(1, dtype=torch.float64), group, "moments", "b")
    return f"{caught.value} {after.item():g}"


@pytest.mark.parametrize("odd", range(WORLD))
def test_other_messages_are_one_error_on_all_hosts_and_the_group_goes_on(pool, odd):
    for size, name in ((50, "a"), (3, "c")):
        first, *others = pool(WORLD).run(_different, odd, size, name)
        assert others == [first] * 3
        assert f"rank {odd} at call 1 of '{name}' (training forward, moments, {size} float" in first
        assert "of 'a' (training forward, moments, 3 float64)" in first
        assert first.endswith(f" {WORLD}")


def _different_within() -> str:
    """Sizes that differ in one host, with no room made: the first of each host has that of all."""
    group = group_of("aabb")
    size = 50 if dist.get_rank() == 3 else 3
    with pytest.raises(ExchangeError) as caught:
        exchange.sum_(torch.ones(size, dtype=torch.float64), group, "moments", "a")
    return str(caught.value)


def test_another_size_in_one_host_is_one_error_on_all(pool):
    first, *others = pool(WORLD).run(_different_within)
    assert others == [first] * 3
    assert "rank 3 at call 1 of 'a' (training forward, moments, 50 float64)" in first


class _Error(NamedTuple):
    text: str
    seconds: float


def _error(group: Group) -> _Error:
    start = time.monotonic()
    with pytest.raises(ExchangeError) as caught:
        exchange.sum_(torch.ones(1, dtype=torch.float64), group, "moments", "a")
    return _Error(str(caught.value), time.monotonic() - start)


def _kill_self(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _outlives(dead: int, when: str) -> list[_Error]:
    """One rank is killed before its second sum, or between the exchange of hosts and its answer."""
    group, one = group_of("aabb"), torch.ones(1, dtype=torch.float64)
    assert exchange.sum_(one, group, "moments", "a").item() == WORLD
    if dist.get_rank() == dead:
        if when == "before":
            _kill_self()
        levels = hosts.levels_of(group)
        assert levels is not None
        between = levels._sum_between
        levels._sum_between = lambda *args: _kill_self(between(*args))  # pyright: ignore
    first: list[_Error] = []
    if when == "after" and dist.get_rank() >= 2:
        # The other host has the sum.
        assert exchange.sum_(one, group, "moments", "a").item() == WORLD
    else:
        first.append(_error(group))
    last = _error(group)
    # Else the end of one that has raised would tell the others.
    store = undocumented.world_store()
    store.set(f"raised {dist.get_rank()}", "")
    store.wait(
        [f"raised {rank}" for rank in range(WORLD) if rank != dist.get_rank() and rank != dead]
    )
    return [*first, last]


@pytest.mark.parametrize(("dead", "when"), [(0, "before"), (1, "before"), (0, "after")])
def test_a_dead_member_is_an_error_on_all_hosts_at_once_and_later_sums_fail(dead, when):
    with RankPool(WORLD) as ranks, pytest.raises(RankFailure) as caught:
        ranks.run(_outlives, dead, when)
    assert set(caught.value.failures) == {dead}
    for rank, errors in caught.value.answers.items():
        assert len(errors) == (1 if when == "after" and rank >= 2 else 2)
        for error in errors:
            assert f"of ranks [0, 1, 2, 3], got an error on rank {rank} at call " in error.text
            # The pool's timeout is 60 s.
            assert error.seconds < 20
            assert is_peer_loss(error.text)
    same_host = caught.value.answers[1 - dead]
    assert f"remote process exited: rank(s) {dead}." in same_host[0].text


def _late(late: int) -> _Error:
    group = group_of("aabb", seconds=3.0)
    exchange.sum_(torch.ones(1, dtype=torch.float64), group, "moments", "a")
    store = undocumented.world_store()
    if dist.get_rank() == late:
        store.wait([f"late {late} {rank}" for rank in range(WORLD) if rank != late])
    error = _error(group)
    store.set(f"late {late} {dist.get_rank()}", "")
    return error


@pytest.mark.parametrize("late", [0, 3])
def test_a_late_member_is_an_error_on_all_hosts_within_the_timeout(pool, late):
    for rank, error in enumerate(pool(WORLD).run(_late, late)):
        assert f"got an error on rank {rank} at call 2 of 'a'" in error.text
        assert error.seconds < 20
        assert is_peer_loss(error.text)


def _waits_for_later() -> _Error:
    """The last rank is in a sum that it waits for later, the others in one that they wait for."""
    group, one = group_of("aabb", seconds=3.0), torch.ones(1, dtype=torch.float64)
    if dist.get_rank() < WORLD - 1:
        return _error(group)
    start, pending = time.monotonic(), exchange.start_sum(one, group, "moments", "a")
    with pytest.raises(ExchangeError) as caught:
        pending.wait()
    return _Error(str(caught.value), time.monotonic() - start)


def test_sums_of_two_ways_are_an_error_within_the_timeout(pool):
    for rank, error in enumerate(pool(WORLD).run(_waits_for_later)):
        assert f"got an error on rank {rank} at call 1 of 'a'" in error.text
        assert error.seconds < 20


def _hangs() -> _Error:
    """The first member of a host has the sum of all, and does not give it to its host."""
    group, rank = group_of("aabb", seconds=3.0), dist.get_rank()
    levels, store = hosts.levels_of(group), undocumented.world_store()
    assert levels is not None
    if rank >= 2:
        exchange.sum_(torch.ones(1, dtype=torch.float64), group, "moments", "a")
        return _Error("", 0.0)
    if rank == 0:
        between = levels._sum_between

        def then_hang(*args: Any) -> Tensor:
            total = between(*args)
            store.wait(["hangs no more"])
            return total

        levels._sum_between = then_hang  # pyright: ignore[reportAttributeAccessIssue]
        return _error(group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hosts, "_MARGIN_SECONDS", 0.5)
        error = _error(group)
    store.set("hangs no more", "")
    return error


def test_a_first_member_that_hangs_is_named_by_its_host(pool):
    first, second, *_ = pool(WORLD).run(_hangs)
    assert "Timed out waiting 3.5 s for rank(s) 0." in second.text
    assert "another member has given up" in first.text


def _skips_in_debug_mode() -> str:
    group = groups.statistics_group()
    assert group is not None
    assert hosts.levels_of(group) is not None
    name = "b" if dist.get_rank() == 3 else "a"
    with debug(timeout_seconds=20), pytest.raises(ExchangeError) as caught:
        exchange.sum_(torch.ones(1, dtype=torch.float64), group, "moments", name)
    return str(caught.value)


def test_debug_mode_tells_who_is_where_on_two_hosts():
    with RankPool(WORLD) as ranks:
        ranks.run(say, "aabb")
        first, *others = ranks.run(_skips_in_debug_mode)
    assert others == [first] * 3
    assert "rank 3 at call 1 of 'b' (training forward, moments, 1 float64)" in first


def _interrupted() -> str:
    """Ctrl-C on a first member while it waits for its host."""
    group, one, rank = group_of("aabb"), torch.ones(1, dtype=torch.float64), dist.get_rank()
    store = undocumented.world_store()
    if rank == 0:
        # A pool's ranks block it.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            exchange.sum_(one, group, "moments", "a")
        store.set("interrupted", "")
    elif rank == 1:
        store.wait(["interrupted"])
    return _error(group).text


def test_after_an_interrupt_nobody_takes_one_sum_for_another():
    with RankPool(WORLD) as ranks:
        texts = ranks.run(_interrupted)
    assert "an earlier exchange of this group broke" in texts[0]
    assert "another member has given up" in texts[1]
    assert all("got an error on rank" in text for text in texts)
