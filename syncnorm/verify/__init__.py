"""Proof, on live workers, that a synchronised layer treats a batch in shards as one batch.

Each check holds the layer against the oracle (`syncnorm.reference`, float64, one process, the whole
batch) and says by how much it is off. `syncnorm verify` runs all of them, on workers of this
machine or as one worker of a launcher.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from syncnorm.verify.check import Check, Verdict
from syncnorm.verify.checks import all_checks
from syncnorm.verify.checks.shards import RUNS
from syncnorm.verify.report import Report, Result
from syncnorm.verify.runner import LaunchedRunner, LocalRunner, Runner
from syncnorm.verify.under_test import DIMENSIONS, LayerUnderTest, layer_under_test, ours

__all__ = [
    "LaunchedRunner",
    "LayerUnderTest",
    "LocalRunner",
    "Report",
    "Result",
    "layer_under_test",
    "ours",
    "verify",
]


def verify(
    runner: Runner,
    layers: Sequence[LayerUnderTest],
    tell: Callable[[Result], object] = id,
    only: Collection[str] = (),
    report: Report | None = None,
) -> Report:
    """Hold layers against the oracle, check by check.

    *Collectives*: those of the layers; every worker of a launched runner must call.

    Args:
        runner: runs a check on all workers.
        layers: the layers under test.
        tell: called with each result as it comes.
        only: names of the checks to run; all if empty.
        report: to be filled, so that it can be seen from outside before the end.

    Returns:
        All results. A check that a layer does not claim, or that needs more workers, is "not
        offered"; so are all others of a layer that cannot take the first step.
    """
    report = report or Report(runner.world_size, runner.backend, runner.device)
    wanted = [check for check in all_checks().values() if not only or check.name in only]
    for under_test in layers:
        refusal = ""
        for check in wanted:
            start = time.perf_counter()
            verdict = _unoffered(runner, check, under_test, refusal) or runner.attempt(
                check, under_test
            )
            if check.name == RUNS and verdict.is_bad:
                refusal = f"it does not pass {RUNS}"
            elif check.name == RUNS and under_test.dimensions != DIMENSIONS:
                verdict = Verdict(verdict.status, under_test.shapes)
            tell(report.add(under_test.reference, check, verdict, time.perf_counter() - start))
    return report


def _unoffered(
    runner: Runner, check: Check, under_test: LayerUnderTest, refusal: str
) -> Verdict | None:
    """The verdict on a check that cannot be attempted; None if it can."""
    if runner.is_lost:
        return Verdict(
            "not run", "an earlier check hangs, and workers of a launcher cannot be started again"
        )
    if refusal:
        return Verdict("not offered", refusal)
    if (lack := under_test.lacks(check.needs)) is not None:
        return Verdict("not offered", lack)
    if runner.world_size < check.workers:
        return Verdict(
            "not offered", f"needs {check.workers} workers, there is {runner.world_size}"
        )
    return None
