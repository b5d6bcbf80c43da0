"""Proof, on live workers, that a synchronised layer treats a batch in shards as one batch.

Each check holds the layer against the oracle (`syncnorm.reference`, float64, one process, the whole
batch) and says by how much it is off. `syncnorm verify` runs all of them, on workers of this
machine or as one worker of a launcher.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from syncnorm.verify.check import Check, Verdict, all_checks
from syncnorm.verify.checks.shards import RUNS
from syncnorm.verify.crew import Crew, LaunchedCrew, LocalCrew
from syncnorm.verify.report import Report, Result
from syncnorm.verify.subject import DIMENSIONS, Subject, ours, subject_of

__all__ = [
    "LaunchedCrew",
    "LocalCrew",
    "Report",
    "Result",
    "Subject",
    "ours",
    "subject_of",
    "verify",
]


def verify(
    crew: Crew,
    subjects: Sequence[Subject],
    tell: Callable[[Result], object] = id,
    only: Collection[str] = (),
    report: Report | None = None,
) -> Report:
    """Hold layers against the oracle, check by check.

    *Collectives*: those of the layers; every worker of a launched crew must call.

    Args:
        crew: who runs the checks.
        subjects: the layers.
        tell: called with each result as it comes.
        only: names of the checks to run; all if empty.
        report: to be filled, so that it can be seen from outside before the end.

    Returns:
        All results. A check that a layer does not claim, or that needs more workers, is "not
        offered"; so are all others of a layer that cannot take the first step.
    """
    report = report or Report(crew.world_size, crew.backend, crew.device)
    wanted = [check for check in all_checks().values() if not only or check.name in only]
    for subject in subjects:
        refusal = ""
        for check in wanted:
            start = time.perf_counter()
            verdict = _unoffered(crew, check, subject, refusal) or crew.attempt(check, subject)
            if check.name == RUNS and verdict.is_bad:
                refusal = f"it does not pass {RUNS}"
            elif check.name == RUNS and subject.dimensions != DIMENSIONS:
                verdict = Verdict(verdict.status, subject.shapes)
            tell(report.add(subject.reference, check, verdict, time.perf_counter() - start))
    return report


def _unoffered(crew: Crew, check: Check, subject: Subject, refusal: str) -> Verdict | None:
    """Why a check is not attempted; None if it is."""
    if crew.is_lost:
        return Verdict(
            "not run", "an earlier check hangs, and workers of a launcher cannot be started again"
        )
    if refusal:
        return Verdict("not offered", refusal)
    if (lack := subject.lacks(check.needs)) is not None:
        return Verdict("not offered", lack)
    if crew.world_size < check.workers:
        return Verdict("not offered", f"needs {check.workers} workers, there is {crew.world_size}")
    return None
