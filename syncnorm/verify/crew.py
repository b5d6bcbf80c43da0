"""Who runs the checks: workers that are started here, or those of which this process is one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from syncnorm.testing import RankFailure, RankPool
from syncnorm.verify.check import Check, Verdict, all_checks
from syncnorm.verify.subject import Subject
from syncnorm.verify.team import Team, join, ranks_in_words

# Time for a worker to say that another does not answer, before it is given up itself.
_GRACE_SECONDS = 5.0
_START_SECONDS = 120.0


class Crew(Protocol):
    """Workers that run one check after the other."""

    world_size: int
    backend: str
    device: str

    def attempt(self, check: Check, subject: Subject) -> Verdict:
        """Run a check on all workers."""
        ...

    @property
    def is_lost(self) -> bool:
        """Whether no further check can be run."""
        ...


class LocalCrew:
    """Workers on this machine, over gloo; started anew after a check that hangs or kills one.

    Args:
        workers: how many.
        deadline_seconds: for one check.
    """

    backend = "gloo"
    device = "cpu"
    is_lost = False

    def __init__(self, workers: int, deadline_seconds: float) -> None:
        self.world_size = workers
        self.deadline_seconds = deadline_seconds
        self._pool: RankPool | None = None

    def attempt(self, check: Check, subject: Subject) -> Verdict:
        pool = self._living_pool()
        try:
            verdicts = pool.run(_attempt, check.name, subject)
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

    def __enter__(self) -> LocalCrew:
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


_team: Team | None = None


def _join(deadline_seconds: float) -> None:
    """On a worker of a pool."""
    global _team
    _team = join(
        dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "127.0.0.1", deadline_seconds
    )


def _attempt(name: str, subject: Subject) -> Verdict:
    """On a worker of a pool."""
    assert _team is not None
    return _team.attempt(all_checks()[name], subject)


def _explain(failure: RankFailure, deadline_seconds: float) -> Verdict:
    """From workers that died or never came back, and what the others had to say."""
    if failure.failures:
        rank, text = next(iter(failure.failures.items()))
        return Verdict("failed", f"rank {rank}: {text.strip().splitlines()[-1]}")
    said = [verdict for verdict in failure.answers.values() if verdict.is_bad]
    if said:
        return Verdict("hangs", said[0].reason)
    return Verdict(
        "hangs", f"no answer from {ranks_in_words(failure.silent)} within {deadline_seconds:g} s"
    )


class LaunchedCrew:
    """The workers of a launcher, this process being one; a check that hangs is the last.

    Args:
        team: this worker among the others.
        backend: of the default process group.
        give_up: called in a thread of its own if this worker itself does not come back from a
            check; to say what was found and to end the process.
    """

    def __init__(
        self, team: Team, backend: str, give_up: Callable[[Check, Subject, Verdict], Any]
    ) -> None:
        self.world_size, self.backend, self.device = team.world_size, backend, team.device.type
        self.is_lost = False
        self._team = team
        self._give_up = give_up

    def attempt(self, check: Check, subject: Subject) -> Verdict:
        seconds = self._team.deadline_seconds
        verdict = Verdict("hangs", f"rank {self._team.rank} did not come back within {seconds:g} s")
        # Rank 0 speaks first.
        alarm = threading.Timer(
            seconds + (1 + (self._team.rank > 0)) * _GRACE_SECONDS,
            self._give_up,
            [check, subject, verdict],
        )
        alarm.daemon = True
        alarm.start()
        try:
            verdict = self._team.attempt(check, subject)
        finally:
            alarm.cancel()
        self.is_lost = verdict.status == "hangs"
        return verdict

    def close(self) -> None:
        """Leave, in an order in which nobody is cut off."""
        self._team.leave(self.is_lost)
