"""Messages over shared memory: the sums of gloo, its errors, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from syncnorm.comm import exchange, groups, shared
from syncnorm.errors import ExchangeError
from syncnorm.testing import RankFailure, RankPool

pytestmark = pytest.mark.skipif(shared.refusal() != "", reason=shared.refusal())


def _is_used() -> bool:
    group = groups.statistics_group()
    assert group is not None
    return shared.segment_of(group) is not None


def _message(number: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * number + dist.get_rank())
    return torch.randn(size, dtype=torch.float64, generator=generator)


def _sums() -> tuple[bool, list[torch.Tensor]]:
    """Sums of many sizes, some of them waited for later than the next ones."""
    group, sums, pending = groups.statistics_group(), [], []
    for number, size in enumerate([1, 3, 9, 5000, 2, 300_000] * 4):
        message = _message(number, size)
        if number % 3 == 0:
            sums.append(exchange.sum_(message, group, "moments", "a"))
        else:
            pending.append(exchange.start_sum(message, group, "moments", "b"))
    return _is_used(), sums + [each.wait() for each in pending]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_sums_are_those_of_gloo_and_the_same_on_all(monkeypatch, world_size):
    found = {}
    for switch in ("1", "0"):
        monkeypatch.setenv("SYNCNORM_SHARED_MEMORY", switch)
        with RankPool(world_size) as ranks:
            answers = ranks.run(_sums)
        assert [is_used for is_used, _ in answers] == [switch == "1"] * world_size
        for _, sums in answers:
            assert all(torch.equal(a, b) for a, b in zip(sums, answers[0][1], strict=True))
        found[switch] = answers[0][1]
    for a, b in zip(found["1"], found["0"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def _larger_than_a_buffer(size_on_the_last: int) -> str:
    group, size = groups.statistics_group(), (1 << 20) + 4
    if dist.get_rank() == dist.get_world_size() - 1:
        size = size_on_the_last
    kinds = (exchange.sum_, lambda *args: exchange.start_sum(*args).wait())
    try:
        for sums in kinds:
            total = sums(torch.arange(size, dtype=torch.float64), group, "moments", "a")
            assert torch.equal(total, torch.arange(size) * 2.0)
    except ExchangeError as error:
        assert exchange.sum_(torch.ones(3).double(), group, "moments", "b").tolist() == [2.0] * 3
        return str(error)
    return "equal"


@pytest.mark.parametrize("size_on_the_last", [(1 << 20) + 4, 1 << 20, 3, (1 << 21) + 9])
def test_messages_larger_than_a_buffer(pool, size_on_the_last):
    answers = pool(2).run(_larger_than_a_buffer, size_on_the_last)
    if size_on_the_last == (1 << 20) + 4:
        assert answers == ["equal"] * 2
    else:
        assert answers[0] == answers[1]
        assert f"{size_on_the_last} float64" in answers[0]


def _turned_off_on(rank: int) -> tuple[bool, float]:
    if dist.get_rank() == rank:
        os.environ["SYNCNORM_SHARED_MEMORY"] = "0"
    one = torch.ones(1, dtype=torch.float64)
    return _is_used(), exchange.sum_(one, groups.statistics_group(), "moments").item()


@pytest.mark.parametrize("rank", [0, 1])
def test_all_use_gloo_where_one_must(rank):
    with RankPool(2) as ranks:
        assert ranks.run(_turned_off_on, rank) == [(False, 2.0)] * 2


def _different(sizes: list[int]) -> str:
    group = groups.statistics_group()
    message = torch.ones(sizes[dist.get_rank()], dtype=torch.float64)
    try:
        exchange.sum_(message, group, "moments", "a")
    except ExchangeError as error:
        after = exchange.sum_(torch.ones(1, dtype=torch.float64), group, "moments", "b")
        return f"{error} {after.item():g}"
    return "no error"


def test_messages_of_different_sizes_are_one_error_and_the_group_goes_on():
    with RankPool(2) as ranks:
        first, second = ranks.run(_different, [3, 50])
    assert first == second
    assert "rank 0 at call 1 of 'a' (training forward, moments, 3 float64)" in first
    assert "rank 1 at call 1 of 'a' (training forward, moments, 50 float64)" in first
    assert first.endswith(" 2")


def _waits_for_the_dead(dead: int) -> str:
    assert _is_used()
    group, one = groups.statistics_group(), torch.ones(1, dtype=torch.float64)
    exchange.sum_(one, group, "moments", "a")
    if dist.get_rank() == dead:
        os.kill(os.getpid(), signal.SIGKILL)
    texts = []
    for _ in range(2):
        with contextlib.suppress(ExchangeError):
            exchange.sum_(one, group, "moments", "a")
        try:
            exchange.sum_(one, group, "moments", "a")
        except ExchangeError as error:
            texts.append(str(error))
    assert len(texts) == 2
    raise ValueError(texts[0])


def test_a_dead_peer_is_an_error_on_all_now_and_later():
    with RankPool(3) as ranks, pytest.raises(RankFailure) as caught:
        ranks.run(_waits_for_the_dead, 1)
    assert set(caught.value.failures) == {0, 1, 2}
    for rank in (0, 2):
        assert f"got an error on rank {rank} at call 3 of 'a'" in caught.value.failures[rank]


def _interrupted() -> list[float]:
    """Ctrl-C on rank 0 while it waits; the message is not lost."""
    group, one = groups.statistics_group(), torch.ones(1, dtype=torch.float64)
    sums = [exchange.sum_(one, group, "moments").item()]
    if dist.get_rank() == 0:
        # A pool's ranks block it.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            exchange.sum_(one, group, "moments")
        dist.barrier()
    else:
        dist.barrier()
        exchange.sum_(one, group, "moments")
    return [*sums, exchange.sum_(3 * one, group, "moments").item()]


def test_an_interrupt_while_waiting():
    with RankPool(2) as ranks:
        assert ranks.run(_interrupted) == [[2.0, 6.0]] * 2


def _traces() -> tuple[int, int]:
    files = len(list(Path("/proc/self/fd").iterdir()))
    return files, Path("/proc/self/maps").read_text().count("/memfd:syncnorm-")


def _left_behind() -> list[tuple[int, int]]:
    """The open files and mappings while there are groups, and a child's."""
    group = groups.statistics_group()
    exchange.sum_(torch.ones(1, dtype=torch.float64), group, "moments")
    child = os.fork()
    if child == 0:
        os._exit(_traces()[1])
    return [_traces(), (0, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))]


def test_a_group_keeps_a_mapping_and_no_file_and_a_child_has_neither():
    with RankPool(2) as ranks:
        for mine, child in ranks.run(_left_behind):
            assert mine[1] == 1
            assert child[1] == 0
