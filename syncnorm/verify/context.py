"""The context of a check on one worker: the layer under test, and results shared with the others.

Results go through a store, not through the process group under test: a check must be able to find
a group that is out of step, or that has a member that waits for good.
"""

from __future__ import annotations

import pickle
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage] documented all the same

from syncnorm.errors import in_one_line
from syncnorm.verify.check import Check, CheckFailed, Verdict
from syncnorm.verify.under_test import LayerUnderTest


@dataclass(frozen=True)
class _End:
    """The end of a check on one worker; sent in place of the value that the others expect."""

    status: str
    reason: str = ""


class _Stopped(Exception):
    """Another worker has ended the check."""

    def __init__(self, ends: list[_End]) -> None:
        self.ends = ends


class _Lost(Exception):
    """Some workers have not come within the deadline."""


class Context:
    """One worker's context in all checks.

    Args:
        store: reached by all workers.
        rank, world_size: of this worker, and how many there are.
        device: on which it computes.
        deadline_seconds: for one check.
    """

    under_test: LayerUnderTest
    device: torch.device
    rank: int
    world_size: int

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        device: torch.device,
        deadline_seconds: float,
    ) -> None:
        self.rank, self.world_size, self.device = rank, world_size, device
        self.deadline_seconds = deadline_seconds
        self._store = store
        self._round = 0
        self._deadline = 0.0

    def gather(self, value: Any) -> list[Any]:
        """Gather a value from every worker, by rank. Every worker must call."""
        values = self._exchange(value)
        if any(isinstance(value, _End) for value in values):
            raise _Stopped(
                [value if isinstance(value, _End) else _End("passed") for value in values]
            )
        return values

    def attempt(self, check: Check, under_test: LayerUnderTest) -> Verdict:
        """Run a check, on all workers at once; the verdict is the same on all that come back."""
        self.under_test = under_test
        self._deadline = time.monotonic() + self.deadline_seconds
        mine = _End("passed")
        try:
            mine = self._run(check)
            return _merge(self._exchange(mine))
        except _Stopped as stopped:
            return _merge(stopped.ends)
        except _Lost as lost:
            said = f"; rank {self.rank} {mine.reason}" if mine.status == "raised" else ""
            return Verdict("hangs", f"{lost}{said}")

    def leave(self, after_hang: bool = False) -> None:
        """Wait for the workers that still need this process, before it ends.

        Rank 0 has the store, so it waits for all. After a check that hangs some will never come;
        then the others wait for rank 0, which prints the report: a launcher ends all workers when
        the first ends.
        """
        self._deadline = time.monotonic() + self.deadline_seconds
        self._store.set(f"left/{self.rank}", "")
        if after_hang and self.rank > 0:
            self._comes("left/0")
        if not after_hang and self.rank == 0:
            for rank in range(self.world_size):
                self._comes(f"left/{rank}")

    def _run(self, check: Check) -> _End:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check.run(self)
        except (_Stopped, _Lost):
            raise
        except CheckFailed as failure:
            return _End("failed", str(failure))
        except Exception as error:  # whatever a layer may raise
            return _End("raised", f"raised {in_one_line(error)[:300]}")
        return _End("passed")

    def _exchange(self, value: Any) -> list[Any]:
        """Exchange values of any kind, by rank."""
        self._round += 1
        keys = [f"{self._round}/{rank}" for rank in range(self.world_size)]
        self._store.set(keys[self.rank], pickle.dumps(value))  # pyright: ignore[reportArgumentType] takes bytes too
        lost = [rank for rank, key in enumerate(keys) if not self._comes(key)]
        if lost:
            raise _Lost(f"no answer from {ranks_in_words(lost)} within {self.deadline_seconds:g} s")
        return [pickle.loads(self._store.get(key)) for key in keys]  # noqa: S301 from our own workers

    def _comes(self, key: str) -> bool:
        try:
            self._store.wait([key], timedelta(seconds=max(0.01, self._deadline - time.monotonic())))
        except (dist.DistStoreError, RuntimeError):
            return False
        return True


def join(
    rank: int, world_size: int, device: torch.device, host: str, deadline_seconds: float
) -> Context:
    """Make this worker's context; the workers have a default process group already.

    *Collectives*: one broadcast on the default group; every worker must call.

    Args:
        rank, world_size, device: of this worker.
        host: of rank 0, as the others reach it.
        deadline_seconds: for one check.
    """
    timeout = timedelta(seconds=deadline_seconds + 60.0)
    store, port = None, [0]
    if rank == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        port = [store.port]
    dist.broadcast_object_list(port, src=0, device=device)
    if store is None:
        store = TCPStore(host, port[0], is_master=False, timeout=timeout)
    return Context(store, rank, world_size, device, deadline_seconds)


def _merge(ends: list[_End]) -> Verdict:
    bad = {rank: end for rank, end in enumerate(ends) if end.status != "passed"}
    if not bad:
        return Verdict("passed")
    raised = [end for end in bad.values() if end.status == "raised"]
    first = (raised or list(bad.values()))[0]
    if first.status != "raised":
        return Verdict("failed", first.reason)
    same = [rank for rank, end in bad.items() if end == first]
    return Verdict("failed", f"{ranks_in_words(same)} {first.reason}")


def ranks_in_words(ranks: list[int]) -> str:
    """rank 1, or ranks 0, 2."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
