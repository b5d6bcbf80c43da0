"""The run of a benchmark: starts the ranks, shares out the time, and goes on after a failure."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from syncnorm.bench import worker
from syncnorm.bench.candidates import LOCAL, Candidate
from syncnorm.bench.cases import MODELS, Case
from syncnorm.bench.report import CaseResult, Cut, Report, Result, summarise
from syncnorm.bench.worker import LEAST_ROUNDS, Prepared
from syncnorm.system import free_memory
from syncnorm.testing import RankFailure, RankPool
from syncnorm.train.memory import format_bytes

# For a call on a busy machine; compiling a model takes minutes there.
_CALL_SECONDS, _COMPILE_SECONDS = 120.0, 900.0
# Tensors of the input's size that a layer's step holds at most, and of a model's parameters that
# each of its candidates keeps: itself and its gradients.
_LAYER_TENSORS, _MODEL_TENSORS = 10, 2


class Failed(Exception):
    """A candidate has failed; the message is one line."""

    def __init__(self, candidate: Candidate, error: str) -> None:
        super().__init__(error)
        self.candidate = candidate


class Runner:
    """Ranks on this machine that compare candidates, case by case.

    Args:
        report: to be filled.
        rounds: of a case, at most.
        tell: called with each case's result as it comes.
    """

    def __init__(
        self, report: Report, rounds: int, tell: Callable[[CaseResult], object] = id
    ) -> None:
        self._report = report
        self._rounds = rounds
        self._tell = tell
        self._pool: RankPool | None = None
        self._lost: dict[Candidate, str] = {}

    def run(self, cases: Sequence[Case], candidates: Sequence[Candidate], seconds: float) -> None:
        """Fill the report within about so many seconds; what they do not suffice for is cut.

        A candidate that fails is told of once and left out from then on.
        """
        start = time.monotonic()
        end = start + seconds
        try:
            for number, case in enumerate(cases):
                now = time.monotonic()
                until = now + (end - now) / (len(cases) - number)
                if now >= end:
                    reason = f"the {seconds:g} seconds were over"
                else:
                    reason = _too_large(case, len(candidates), self._report)
                if reason is None:
                    reason = self._measure(case, candidates, until, end)
                if reason is not None:
                    self._report.cut.append(Cut(what=case.name, reason=reason))
        finally:
            self.close()
            self._report.seconds = round(time.monotonic() - start, 1)

    def close(self) -> None:
        """End the ranks."""
        if self._pool is not None:
            self._pool.close()

    def _measure(
        self, case: Case, candidates: Sequence[Candidate], until: float, end: float
    ) -> str | None:
        """Report a case; return the reason if it is cut."""
        failed: dict[Candidate, str] = {}
        while True:
            taking_part = [
                one
                for one in candidates
                if one not in self._lost and len(case.shape) in one.dimensions
            ]
            try:
                found = self._attempt(case, taking_part, until, end)
            except Failed as failure:
                failed[failure.candidate] = self._lost[failure.candidate] = str(failure)
                if failure.candidate.name == LOCAL:
                    return f"the local layer failed: {failure}"
                continue
            except RankFailure as failure:
                return _last_line(failure)
            if isinstance(found, str):
                return found
            found.results += [
                Result(layer=one.layer, compiled=one.is_compiled, error=error)
                for one, error in failed.items()
            ]
            self._report.cases.append(found)
            self._tell(found)
            return None

    def _attempt(
        self, case: Case, candidates: Sequence[Candidate], until: float, end: float
    ) -> CaseResult | str:
        pool = self._living_pool(any(one.is_compiled for one in candidates))
        calls = pool.run(worker.begin, case, self._report.device)[0]
        prepared: dict[Candidate, Prepared] = {}
        # Given ones first: what fails makes the others begin again.
        for one in sorted(candidates, key=lambda one: ":" not in one.layer):
            if time.monotonic() >= end:
                return f"no time was left after {len(prepared)} layers had taken their first steps"
            try:
                prepared[one] = pool.run(worker.prepare, one)[0]
            except RankFailure as failure:
                raise Failed(one, _last_line(failure)) from None
        pool.timeout_seconds += max(0.0, end - time.monotonic())
        seconds = pool.run(worker.take_rounds, self._rounds, until, end)[0]
        done = len(seconds[LOCAL])
        if done < min(self._rounds, LEAST_ROUNDS):
            return f"time was left for {done} rounds only"
        try:
            peaks = pool.run(worker.peaks)[0]
        except RankFailure as failure:  # the times are worth having without
            peaks = {}
            reason = _last_line(failure)
            self._report.cut.append(Cut(what=f"{case.name}, peak memory", reason=reason))
        return summarise(case, calls, seconds, {one: prepared[one] for one in candidates}, peaks)

    def _living_pool(self, compiles: bool) -> RankPool:
        seconds = _COMPILE_SECONDS if compiles else _CALL_SECONDS
        if self._pool is None or not self._pool.is_alive:
            report = self._report
            self._pool = RankPool(report.workers, report.backend, seconds, report.device)
        self._pool.timeout_seconds = seconds
        return self._pool


def _too_large(case: Case, candidates: int, report: Report) -> str | None:
    """The reason why a case does not fit into the memory of this machine; None if it may."""
    if report.device != "cpu":
        return None  # the card says so itself
    if case.model is None:
        numbers = _LAYER_TENSORS * torch.Size(case.shape).numel()
    else:
        numbers = _MODEL_TENSORS * candidates * MODELS[case.model]
    need, free = 4 * numbers * report.workers, free_memory()
    if need <= free:
        return None
    return f"it takes {format_bytes(need)} and more, and {format_bytes(free)} are free"


def _last_line(failure: RankFailure) -> str:
    """The error of the first rank that told one."""
    if not failure.failures:
        return f"no answer from rank {', '.join(map(str, failure.silent))}"
    rank, text = next(iter(failure.failures.items()))
    return f"rank {rank}: {' '.join(text.strip().splitlines()[-1].split())[:300]}"
