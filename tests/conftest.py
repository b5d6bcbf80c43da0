"""Pools of ranks, one per world size, kept for the whole test run; and which tests belong together."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from syncnorm.testing import RankPool
from tests.launch import forked

torch.set_num_threads(1)
# A page costs a run three seconds of a core; the tests of the page ask for it.
os.environ.setdefault("SYNCNORM_REPORT", "0")
# A shell lets its background jobs ignore Ctrl-C, and so would all commands that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long something takes is the machine's: deadlines are for what hangs.
settings.register_profile(
    "tests",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("tests")
POOL_SECONDS = 600.0
# Each process group of gloo keeps a thread that wakes a hundred times a second, and two more: those
# of a few hundred groups that tests have left behind take a fifth of two cores.
POOL_THREADS = 40
# They share one cluster.
RAY = ("test_ray.py", "test_ray_verify.py")
# Files that take minutes, the longest first. Where files run side by side, one that began last
# would go on alone.
LONGEST = (
    *RAY,
    "test_tasks.py",
    "test_ended_runs.py",
    "test_fit.py",
    "test_compile.py",
    "test_kill_drill.py",
    "test_documents.py",
    "test_system.py",
    "test_device_course.py",
    "test_store.py",
    "test_seam_examples.py",
    "test_interrupt.py",
    "test_diagnosed.py",
    "test_gpu_bench.py",
    "test_triton.py",
    "test_ptx.py",
    "test_other_layers.py",
    "test_site.py",
    "test_weights.py",
    "test_step.py",
    "test_fuzz.py",
    "test_family_averages_model.py",
    "test_loop.py",
    "test_workers.py",
    "test_fault_drill.py",
    "test_report_browser.py",
    "test_verify.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file in one process, where several run side by side: they share what
    their fixtures make. (Marks of groups are not it: xdist 3.8 loses them under pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "ray" if path.rpartition("/")[2] in RAY else path

    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def server() -> None:
    """The process whose forks are commands and ranks; it imports torch while the first tests run."""
    forked.serve()


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], RankPool]]:
    """pool(world_size): a live RankPool; started anew if a failure or too many threads ended it."""
    pools: dict[int, RankPool] = {}

    def get(world_size: int) -> RankPool:
        kept = pools.get(world_size)
        if kept is not None and kept.is_alive and max(kept.run(_count_threads)) > POOL_THREADS:
            kept.close()
        if kept is None or not kept.is_alive:
            pools[world_size] = RankPool(world_size, timeout_seconds=POOL_SECONDS)
        return pools[world_size]

    yield get
    for each in pools.values():
        each.close()


def _count_threads() -> int:
    """The threads of this process, native ones too; 0 where the system does not say."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 0
