"""Messages over shared memory: the sums of gloo, its errors, and nothing left behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from syncnorm import native, undocumented
from syncnorm.comm import exchange, groups, hosts, shared
from syncnorm.errors import ExchangeError
from syncnorm.native import build
from syncnorm.testing import RankFailure, RankPool
from tests import ways

pytestmark = pytest.mark.skipif(ways.refusal() != "", reason=ways.refusal())


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
    rows = _message(0, 12).view(3, 4)
    sums += [exchange.sum_(each, group, "gradients", "a") for each in (rows, rows.T)]
    torch.testing.assert_close(sums[-2], sums[-1].T, rtol=1e-12, atol=1e-12)
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


def _turned_off_on(rank: int, switch: str) -> tuple[bool, float]:
    if dist.get_rank() == rank:
        os.environ[switch] = "0"
        # The pool's server has loaded the library before.
        native.load.cache_clear()
        shared._functions.cache_clear()
    one = torch.ones(1, dtype=torch.float64)
    return _is_used(), exchange.sum_(one, groups.statistics_group(), "moments").item()


@pytest.mark.parametrize("switch", ["SYNCNORM_SHARED_MEMORY", "SYNCNORM_NATIVE"])
@pytest.mark.parametrize("rank", [0, 1])
def test_all_use_gloo_where_one_must(rank, switch):
    with RankPool(2) as ranks:
        assert ranks.run(_turned_off_on, rank, switch) == [(False, 2.0)] * 2


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


class _Error(NamedTuple):
    text: str
    seconds: float


def _error(message: torch.Tensor) -> _Error:
    start = time.monotonic()
    with pytest.raises(ExchangeError) as caught:
        exchange.sum_(message, groups.statistics_group(), "moments", "a")
    return _Error(str(caught.value), time.monotonic() - start)


def _outlives(dead: int, starts: bool) -> list[_Error]:
    """One rank is killed, before it starts the second sum or between that and its end."""
    assert _is_used()
    group, one = groups.statistics_group(), torch.ones(1, dtype=torch.float64)
    assert exchange.sum_(one, group, "moments", "a").item() == 3
    if dist.get_rank() == dead:
        if starts:
            exchange.start_sum(one, group, "moments", "a")
        os.kill(os.getpid(), signal.SIGKILL)
    store = undocumented.world_store()
    if starts and dist.get_rank() == 2:
        # Rank 0 hears of the death although the dead one has sent its part.
        store.wait(["raised"])
    first = _error(one)
    store.set("raised", "")
    return [first, _error(one)]


@pytest.mark.parametrize("starts", [False, True])
def test_a_dead_peer_is_named_by_all_at_once_and_later_sums_fail(starts):
    with RankPool(3) as ranks, pytest.raises(RankFailure) as caught:
        ranks.run(_outlives, 1, starts)
    assert set(caught.value.failures) == {1}
    for rank in (0, 2):
        first, second = caught.value.answers[rank]
        assert f"got an error on rank {rank} at call 2 of 'a'" in first.text
        assert "remote process exited: rank(s) 1." in first.text
        # The pool's timeout is 60 s.
        assert first.seconds + second.seconds < 40
        assert f"got an error on rank {rank} at call 3 of 'a'" in second.text


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


def _traces() -> tuple[int, list[str]]:
    """How many files are open, and what is mapped to be shared."""
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    shared_maps = [fields[5] for fields in maps if fields[1][3] == "s" and len(fields) > 5]
    return len(list(Path("/proc/self/fd").iterdir())), shared_maps


def _left_behind() -> tuple[list[str], list[str], int]:
    """What is mapped before there is a group, and then; how much of it is in a forked child."""
    before = _traces()[1]
    exchange.sum_(torch.ones(1, dtype=torch.float64), groups.statistics_group(), "moments")
    child = os.fork()
    if child == 0:
        os._exit(sum("memfd:syncnorm" in path for path in _traces()[1]))
    return before, _traces()[1], os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_group_is_one_mapping_without_a_name_which_a_child_has_not():
    with RankPool(2) as ranks:
        for before, after, in_child in ranks.run(_left_behind):
            (mine,) = set(after) - set(before)
            assert len(after) == len(before) + 1
            assert mine.startswith("/memfd:syncnorm-")
            assert mine.endswith(" (deleted)")
            assert in_child == 0


def _makes_groups(number: int) -> list[tuple[int, int]]:
    """Open files and mappings after each of many groups has gone."""
    world, traces = dist.group.WORLD, []
    assert world is not None
    for _ in range(number):
        group = dist.new_group([0, 1])
        hosts.negotiate(group, groups.machine_id())
        assert shared.segment_of(group) is not None
        assert exchange.sum_(torch.ones(1, dtype=torch.float64), group, "moments").item() == 2
        dist.barrier()
        dist.destroy_process_group(group)
        del group
        gc.collect()
        files, maps = _traces()
        traces.append((files, sum("memfd:syncnorm" in path for path in maps)))
    return traces


def test_groups_that_have_gone_leave_nothing():
    with RankPool(2) as ranks:
        for traces in ranks.run(_makes_groups, 6):
            assert {maps for _, maps in traces} == {0}
            # gloo's own threads close theirs when they come to it.
            assert traces[-1][0] <= traces[1][0] + 2


def _fails_between_the_gathers() -> int:
    group = dist.new_group([0, 1])
    if dist.get_rank() == 1:
        shared.map_first = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError):
        hosts.negotiate(group, groups.machine_id())
    assert shared.segment_of(group) is None
    return sum("memfd:syncnorm" in path for path in _traces()[1])


def test_a_member_that_ends_while_the_group_is_made_leaves_no_mapping():
    with RankPool(2) as ranks, pytest.raises(RankFailure) as caught:
        ranks.run(_fails_between_the_gathers)
    assert caught.value.answers == {0: 0}


def _sums_by_threads() -> tuple[bool, int]:
    """Sums of a thread for each of two groups; a child of a fork meanwhile is refused at once."""
    made = [groups.statistics_group(), dist.new_group([0, 1])]
    hosts.negotiate(made[1], groups.machine_id())
    assert all(shared.segment_of(group) is not None for group in made)
    sums: list[list[float]] = [[], []]

    def add(which: int) -> None:
        for number in range(300):
            one = torch.full((1 + number % 7,), number, dtype=torch.float64)
            sums[which].append(exchange.sum_(one, made[which], "moments", f"{which}")[-1].item())

    threads = [threading.Thread(target=add, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    child = os.fork()
    if child == 0:
        try:
            exchange.sum_(torch.ones(1, dtype=torch.float64), made[0], "moments", "child")
        except ExchangeError as error:
            os._exit(0 if "a forked process has no part" in str(error) else 1)
        os._exit(2)
    for thread in threads:
        thread.join()
    expected = [2.0 * number for number in range(300)]
    return sums == [expected] * 2, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_threads_sum_at_once_and_a_forked_child_is_refused():
    with RankPool(2) as ranks:
        assert ranks.run(_sums_by_threads) == [(True, 0)] * 2


@pytest.mark.parametrize("messages", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_sums_of_random_sizes_by_processes_that_run_ahead(tmp_path, messages):
    program, here = tmp_path / "stress", Path(__file__).parent
    flags = ["-std=c11", "-O2", "-pthread", "-include", str(build.HERE / "messages.c")]
    source = here / "messages_stress.c"
    command = [*build.compiler(), *flags, str(source), "-o", str(program), "-lm"]
    subprocess.run(command, check=True, timeout=120)
    ran = subprocess.run(
        [program, "4", str(messages), "7"], stderr=subprocess.PIPE, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr


def test_a_process_is_known_by_any_name():
    """The system cuts a name off at 15 bytes, within a letter if need be."""
    name = 'import ctypes, sys; ctypes.CDLL(None).prctl(15, "обучение".encode()); sys.stdin.read()'
    with subprocess.Popen([sys.executable, "-c", name], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        try:
            until, stat = time.monotonic() + 30.0, Path(f"/proc/{process.pid}/stat")
            while "обу".encode() not in stat.read_bytes():
                assert time.monotonic() < until
                time.sleep(0.01)
            assert shared.start_of(process.pid) != ""
        finally:
            process.stdin.close()
