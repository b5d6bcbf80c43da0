"""The pool of ranks itself: a failure is named and ends the pool."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from syncnorm.testing import RankFailure, RankPool, assert_close


def _rank() -> tuple[int, int, int]:
    return dist.get_rank(), dist.get_world_size(), torch.get_num_threads()


def _fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"boom on {rank}")


def _die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        signal.pause()


def test_runs_on_every_rank_with_one_thread(pool):
    assert pool(3).run(_rank) == [(0, 3, 1), (1, 3, 1), (2, 3, 1)]


_locks = []


def _make_a_lock() -> str:
    """As tqdm does, which torch's compiler uses."""
    _locks.append(multiprocessing.get_context("spawn").RLock())
    return _locks[-1]._semlock.name


def test_an_exception_names_the_rank_and_its_traceback_and_nothing_is_left_behind():
    with RankPool(2) as ranks:
        locks = [Path(f"/dev/shm/sem.{name[1:]}") for name in ranks.run(_make_a_lock)]
        assert all(lock.exists() for lock in locks) or not locks[0].parent.exists()
        with pytest.raises(RankFailure, match=r"(?s)rank 1: Traceback.*ValueError: boom on 1"):
            ranks.run(_fail_on, 1)
        assert not ranks.is_alive
        with pytest.raises(RankFailure, match="ended by an earlier failure"):
            ranks.run(_rank)
    assert not any(lock.exists() for lock in locks)


def test_a_death_is_named():
    with RankPool(2) as ranks, pytest.raises(RankFailure, match=r"rank 1: the process died"):
        ranks.run(_die_on, 1)


def test_a_hang_ends_at_the_deadline():
    with RankPool(2) as ranks:
        ranks.timeout_seconds = 1.0
        with pytest.raises(RankFailure, match=r"rank 0: no answer"):
            ranks.run(_hang_on, 0)


def test_assert_close_can_fail():
    good = torch.linspace(0, 1, 5, dtype=torch.float64)
    bad = good.clone()
    bad[3] += 1e-6
    assert_close(good, good, torch.float64, "same")
    assert_close(bad, good, torch.float32, "within float32")
    with pytest.raises(
        AssertionError, match=r"off: 1 of 5 elements are off; at flat index 3 got 0\.750001"
    ):
        assert_close(bad, good, torch.float64, "off")
    bad[3] = torch.nan
    with pytest.raises(AssertionError, match=r"flat index 3 got nan"):
        assert_close(bad, good, torch.float32, "nan")
    infinite = torch.full((5,), torch.inf, dtype=torch.float64)
    assert_close(infinite, infinite, torch.float64, "inf")
    with pytest.raises(AssertionError, match="5 of 5 elements are off"):
        assert_close(good, infinite, torch.float64, "inf")
    with pytest.raises(AssertionError, match=r"shape \(4,\), expected \(5,\)"):
        assert_close(good[:4], good, torch.float64, "shape")
