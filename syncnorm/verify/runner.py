"""Runners of checks: on workers that are started here, or as one worker of a launcher."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from syncnorm.testing import RankFailure, RankPool
from syncnorm.verify.check import Check, Verdict
from syncnorm.verify.checks import all_checks
from syncnorm.verify.context import Context, join, ranks_in_words
from syncnorm.verify.under_test import LayerUnderTest

# Time for a worker to say that another does not answer, before it is given up itself.
_GRACE_SECONDS = 5.0
_START_SECONDS = 120.0


class Runner(Protocol):
    """Workers that run one check after the other."""

    world_size: int
    backend: str
    device: str

    def attempt(self, check: Check, under_test: LayerUnderTest) -> Verdict:
        """Run a check on all workers."""
        ...

    @property
    def is_lost(self) -> bool:
        """True if no further check can be run."""
        ...


class LocalRunner:
    """Workers on this machine, over gloo; started anew after a check that hangs or kills one.

    Args:
        workers: their number.
        deadline_seconds: for one check.
    """

    backend = "gloo"
    device = "cpu"
    is_lost = False

    def __init__(self, workers: int, deadline_seconds: float) -> None:
        self.world_size = workers
        self.deadline_seconds = deadline_seconds
        self._pool: RankPool | None = None

    def attempt(self, check: Check, under_test: LayerUnderTest) -> Verdict:
        pool = self._living_pool()
        try:
            verdicts = pool.run(_attempt, check.name, under_test)
        except RankFailure as failure:
            return _explain(failure, self.deadline_seconds)
        hung = [verdict for verdict in verdicts if verdict.status == "hangs"]
        if hung:
            pool.close()
        return (hung or verdicts)[0]

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> LocalRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _living_pool(self) -> RankPool:
        if self._pool is None or not self._pool.is_alive:
            # The deadline is for checks; starting takes what it takes.
            self._pool = RankPool(
                self.world_size, timeout_seconds=self.deadline_seconds + _START_SECONDS
            )
            self._pool.run(_join, self.deadline_seconds)
            self._pool.timeout_seconds = self.deadline_seconds + _GRACE_SECONDS
        return self._pool


_context: Context | None = None


def _join(deadline_seconds: float) -> None:
    """On a worker of a pool."""
    global _context
    _context = join(
        dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "127.0.0.1", deadline_seconds
    )


def _attempt(name: str, under_test: LayerUnderTest) -> Verdict:
    """On a worker of a pool."""
    assert _context is not None
    return _context.attempt(all_checks()[name], under_test)


def _explain(failure: RankFailure, deadline_seconds: float) -> Verdict:
    """Return the verdict where workers died or did not come back."""
    if failure.failures:
        rank, text = next(iter(failure.failures.items()))
        return Verdict("failed", f"rank {rank}: {text.strip().splitlines()[-1]}")
    said = [verdict for verdict in failure.answers.values() if verdict.is_bad]
    if said:
        return Verdict("hangs", said[0].reason)
    return Verdict(
        "hangs", f"no answer from {ranks_in_words(failure.silent)} within {deadline_seconds:g} s"
    )


class LaunchedRunner:
    """The workers of a launcher, this process being one; a check that hangs is the last.

    Args:
        context: this worker among the others.
        backend: of the default process group.
        give_up: called in a thread of its own if this worker itself does not come back from a
            check; prints the report and ends the process.
    """

    backend: str
    device: str
    world_size: int
    is_lost: bool

    def __init__(
        self,
        context: Context,
        backend: str,
        give_up: Callable[[Check, LayerUnderTest, Verdict], Any],
    ) -> None:
        self.world_size, self.backend, self.device = (
            context.world_size,
            backend,
            context.device.type,
        )
        self.is_lost = False
        self._context = context
        self._give_up = give_up

    def attempt(self, check: Check, under_test: LayerUnderTest) -> Verdict:
        seconds = self._context.deadline_seconds
        verdict = Verdict(
            "hangs", f"rank {self._context.rank} did not come back within {seconds:g} s"
        )
        # Rank 0 speaks first.
        alarm = threading.Timer(
            seconds + (1 + (self._context.rank > 0)) * _GRACE_SECONDS,
            self._give_up,
            [check, under_test, verdict],
        )
        alarm.daemon = True
        alarm.start()
        try:
            verdict = self._context.attempt(check, under_test)
        finally:
            alarm.cancel()
        self.is_lost = verdict.status == "hangs"
        return verdict

    def close(self) -> None:
        """Wait for the workers that still need this process."""
        self._context.leave(self.is_lost)
