"""Groups whose members are on several hosts: sums on two levels, who agrees, and what is left."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from syncnorm import undocumented
from syncnorm.comm import exchange, groups, hosts, shared
from syncnorm.errors import ExchangeError
from syncnorm.testing import RankPool
from syncnorm.verify import collectives
from tests import ways
from tests.distributed import steps
from tests.distributed.on_hosts import WORLD, group_of, say
from tests.model import test_join, test_join_loops

pytestmark = pytest.mark.skipif(ways.refusal() != "", reason=ways.refusal())


def _message(number: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * number + dist.get_rank())
    return torch.randn(size, dtype=torch.float64, generator=generator)


def _sums(layout: str) -> tuple[list[Tensor], list[Tensor], list[tuple[str, int]]]:
    """Sums of many sizes, with one that is started and waited for later; those of gloo; the counts."""
    group = group_of(layout)
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
    group = group_of(layout)
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


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[RankPool]:
    with RankPool(WORLD) as ranks:
        ranks.run(say, "aabb")
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


def _in_a_child() -> tuple[float, int]:
    group, one = group_of("aabb"), torch.ones(1, dtype=torch.float64)
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
    group = group_of(layout)
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
