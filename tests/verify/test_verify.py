"""`syncnorm verify`: on our layers, on somebody else's, on those that hang; its output and its exit status."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from syncnorm.cli import main
from syncnorm.verify import LocalCrew, Report, ours, subject_of, verify
from syncnorm.verify.check import all_checks
from tests.launch import commands


def _by_check(report: Report) -> dict[str, tuple[str, str]]:
    return {result.check: (result.status, result.reason) for result in report.results}


def _verified(layer: str, workers: int = 2, deadline_seconds: float = 60.0, only: str = "") -> Report:
    with LocalCrew(workers, deadline_seconds) as crew:
        return verify(crew, [subject_of(layer)], only=only.split())


@pytest.mark.parametrize("workers", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_our_layers_pass_all_that_they_claim(workers):
    with LocalCrew(workers, 60.0) as crew:
        report = verify(crew, ours())
    assert report.exit_status == 0, [r for r in report.results if r.status not in ("passed", "not offered")]
    for subject in ours():
        status = {r.check: r.status for r in report.results if r.layer == subject.reference}
        assert status.keys() == all_checks().keys()
        left_out = {check for check in all_checks().values() if status[check.name] == "not offered"}
        for check in left_out:
            assert check.workers > workers or subject.lacks(check.needs)
        assert sum(s == "passed" for s in status.values()) >= (60 if workers == 1 else 80)


# Check -> what it says of a layer with every classic mistake.
NAIVE = {
    "equal-shards": r"step 1: input gradient of rank 0 is \S+ off, allowed \S+ \(got \S+, should be \S+\)",
    "ragged-shards": r"step 1: input gradient of rank 0 is \S+ off",
    "all-but-one-empty": "running_var of rank 0 is",
}


def test_a_layer_with_every_classic_mistake_fails_with_reasons():
    report = _verified("tests.verify.naive:Naive")
    found = _by_check(report)
    for name, (status, reason) in found.items():
        print(f"{name!r}: ({status!r}, {reason!r}),")
    raise SystemExit


def test_torch_sync_batch_norm_refuses_the_cpu_and_nothing_hangs():
    found = _by_check(_verified("torch.nn:SyncBatchNorm"))
    status, reason = found.pop("runs")
    assert status == "failed"
    assert re.search("ranks 0, 1 raised ValueError: SyncBatchNorm expected input tensor to be on GPU", reason)
    assert set(found.values()) == {("not offered", f"runs: {reason}")}


def test_torch_batch_norm_alone_passes_all_that_it_claims():
    """The checks judge somebody else's layer fairly: in one process torch's own is right but for the degenerate."""
    found = _by_check(_verified("torch.nn:BatchNorm1d", workers=1))
    for name, (status, reason) in found.items():
        if status != "passed": print(f"{name!r}: ({status!r}, {reason!r}),")
    raise SystemExit


def test_checks_that_nobody_claims_yet_can_pass_and_fail():
    names = {"double-backward", "compile"}
    for layer, status in (("torch.nn:BatchNorm1d", "passed"), ("syncnorm:SyncBatchNorm", "failed")):
        subject = subject_of(layer)
        with LocalCrew(1, 60.0) as crew:
            report = verify(crew, [replace(subject, claims=subject.claims | {"double backward", "compile"})], only=names)
        print(report)
    raise SystemExit
