"""Groups whose members are on several hosts: sums on two levels, their errors, and who agrees.

A member's host is what it says: here they share this machine, and say what a test tells them.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm import debug, undocumented
from syncnorm.comm import exchange, groups, hosts, shared
from syncnorm.comm.groups import Group
from syncnorm.errors import ExchangeError
from syncnorm.run.failures import is_peer_loss
from syncnorm.testing import RankFailure, RankPool
from syncnorm.verify import collectives
from tests.distributed import steps
from tests.model import test_join, test_join_loops

pytestmark = pytest.mark.skipif(shared.refusal() != "", reason=shared.refusal())
WORLD = 4


def _group(layout: str, seconds: float = 60.0) -> Group:
    """A group of all ranks, each on the host of its letter."""
    group = dist.new_group(list(range(len(layout))), timeout=timedelta(seconds=seconds))
    assert isinstance(group, Group)
    hosts.negotiate(group, layout[dist.get_rank()])
    return group


def _message(number: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * number + dist.get_rank())
    return torch.randn(size, dtype=torch.float64, generator=generator)


def _sums(layout: str) -> tuple[list[Tensor], list[Tensor], list[tuple[str, int]]]:
    """Sums of many sizes, with one that is started and waited for later; those of gloo; the counts."""
    group = _group(layout)
    assert hosts.levels_of(group) is not None
    assert shared.segment_of(group) is None
    with exchange.record() as made:
        later = exchange.start_sum(_message(9, 5), group, "moments", "b")
        sizes = [1, 3, 9, 5000, 2, (1 << 20) + 4]
        sums = [exchange.sum_(_message(n, s), group, "moments", "a") for n, s in enumerate(sizes)]
        sums.append(later.wait())
    wires = [_message(n, s) for n, s in enumerate(sizes)] + [_message(9, 5)]
    for wire in wires:
        dist.all_reduce(wire)
    return sums, wires, [each[:2] for each in made]


@pytest.mark.parametrize("layout", ["aabb", "abab", "abbb", "aabc"])
def test_sums_are_those_of_gloo_and_the_same_on_all(pool, layout):
    (first, plain, made), *others = pool(WORLD).run(_sums, layout)
    for mine, expected in zip(first, plain, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    for sums, _, counts in others:
        assert all(torch.equal(a, b) for a, b in zip(sums, first, strict=True))
        assert (
            counts
            == made
            == [("moments", exchange.size_of(n)) for n in (5, 1, 3, 9, 5000, 2, (1 << 20) + 4)]
        )


def _ways(layout: str) -> tuple[bool, bool]:
    group = _group(layout)
    one = torch.ones(1, dtype=torch.float64)
    assert exchange.sum_(one, group, "moments").item() == WORLD
    return shared.segment_of(group) is not None, hosts.levels_of(group) is not None


def _breaks(layout: str, what: str, ranks: list[int]) -> tuple[bool, bool]:
    def fail(*_: object) -> None:
        raise OSError(what) if what == "_open" else RuntimeError(what)

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() in ranks:
            patch.setattr(shared if what == "_open" else undocumented, what, fail)
        return _ways(layout)


def test_one_host_and_hosts_of_one_member_have_one_level(pool):
    assert pool(WORLD).run(_ways, "aaaa") == [(True, False)] * WORLD
    assert pool(WORLD).run(_ways, "abcd") == [(False, False)] * WORLD


def test_all_use_gloo_where_one_cannot_do_its_part(pool):
    """One that cannot have the memory of its host; first members that do not meet."""
    assert pool(WORLD).run(_breaks, "aabb", "_open", [3]) == [(False, False)] * WORLD
    assert pool(WORLD).run(_breaks, "aabb", "gloo_beside", [0, 2]) == [(False, False)] * WORLD
    assert pool(WORLD).run(_breaks, "aabb", "_open", []) == [(False, True)] * WORLD


def _turned_off(rank: int) -> tuple[bool, bool]:
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            patch.setenv("SYNCNORM_SHARED_MEMORY", "0")
        return _ways("aabb")


def test_all_use_gloo_where_one_is_told_to(pool):
    assert pool(WORLD).run(_turned_off, 1) == [(False, False)] * WORLD


def _different(odd: int, size: int, name: str) -> str:
    group = _group("aabb")
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
    group = _group("aabb")
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
    group, one = _group("aabb"), torch.ones(1, dtype=torch.float64)
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
    group = _group("aabb", seconds=3.0)
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
    group, one = _group("aabb", seconds=3.0), torch.ones(1, dtype=torch.float64)
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
    group, rank = _group("aabb", seconds=3.0), dist.get_rank()
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


def _say(layout: str) -> None:
    """Have every group from now on find its members on these hosts."""
    groups.machine_id = lambda: layout[dist.get_rank()]


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[RankPool]:
    with RankPool(WORLD) as ranks:
        ranks.run(_say, "aabb")
        yield ranks


def test_layers_on_two_hosts_equal_the_oracle_with_one_exchange_a_pass(two_hosts):
    batches = [steps.Batch.random((9, 4, 3), torch.float32, seed=seed) for seed in (0, 1)]
    sizes = [4, 0, 3, 2]
    got = steps.run_steps(two_hosts, batches, sizes)
    steps.check_against_oracle(got, batches, sizes)
    for outcomes in got:
        assert all(o.exchanges == [("moments", 10), ("gradients", 10)] for o in outcomes)


def _collectives() -> list[tuple[str, int]]:
    group, one = groups.statistics_group(), torch.ones(1, dtype=torch.float64)
    with collectives.counted() as seen:
        exchange.sum_(one, group, "moments")
        exchange.start_sum(one, group, "moments").wait()
    return seen


def test_a_sum_on_either_level_counts_as_one_collective(two_hosts):
    assert two_hosts.run(_collectives) == [[("allreduce", 2)] * 2] * WORLD


def test_uneven_data_on_two_hosts(two_hosts):
    counts = [3, 1, 0, 2]
    got = two_hosts.run(test_join._on_worker, counts)
    test_join._compare(got, test_join._on_one(counts), counts)


def test_an_error_of_one_worker_in_join_is_told_to_those_of_the_other_host(two_hosts):
    *others, last = two_hosts.run(test_join_loops._failed, "one", [0, 2, 2, 2])
    words = "ExchangeError: the block of `join` must end alike on all workers that have data"
    assert others.pop(2) == "ValueError: a user's own"
    assert all(said.startswith(words) for said in [*others, last])


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
        ranks.run(_say, "aabb")
        first, *others = ranks.run(_skips_in_debug_mode)
    assert others == [first] * 3
    assert "rank 3 at call 1 of 'b' (training forward, moments, 1 float64)" in first


def _interrupted() -> str:
    """Ctrl-C on a first member while it waits for its host."""
    group, one, rank = _group("aabb"), torch.ones(1, dtype=torch.float64), dist.get_rank()
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


def _in_a_child() -> tuple[float, int]:
    group, one = _group("aabb"), torch.ones(1, dtype=torch.float64)
    levels = hosts.levels_of(group)
    assert levels is not None
    child = os.fork()
    if child == 0:
        try:
            exchange.sum_(one, group, "moments", "child")
        except ExchangeError as error:
            # The memory is not mapped here.
            levels._within = None
            gc.collect()
            os._exit(0 if shared.FORKED in str(error) else 1)
        os._exit(2)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return exchange.sum_(one, group, "moments").item(), status


def test_a_forked_child_is_refused_and_its_parent_goes_on(two_hosts):
    assert two_hosts.run(_in_a_child) == [(WORLD, 0)] * WORLD


def _goes(layout: str) -> tuple[int, int]:
    """Mappings and threads of a group, once it has gone."""
    before = len(list(Path("/proc/self/task").iterdir()))
    group = _group(layout)
    exchange.sum_(torch.ones(1, dtype=torch.float64), group, "moments")
    dist.barrier()
    dist.destroy_process_group(group)
    del group
    gc.collect()
    maps = sum("memfd:syncnorm" in line for line in Path("/proc/self/maps").read_text().split("\n"))
    return maps, len(list(Path("/proc/self/task").iterdir())) - before


def test_a_group_that_has_gone_leaves_nothing():
    with RankPool(WORLD) as ranks:
        # gloo's threads outlive none of its groups, but that of the first may be the device's own.
        ranks.run(_goes, "aabb")
        for maps, threads in ranks.run(_goes, "aabb"):
            assert maps == 0
            assert threads <= 0
