"""Our layers pass every check that they claim, on any number of workers."""

from __future__ import annotations

import pytest

from syncnorm.verify import LocalCrew, ours, verify
from syncnorm.verify.check import all_checks


@pytest.mark.parametrize("workers", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_our_layers_pass_all_that_they_claim(workers):
    with LocalCrew(workers, 600.0) as crew:
        report = verify(crew, ours())
    assert report.exit_status == 0, [
        r for r in report.results if r.status not in ("passed", "not offered")
    ]
    for subject in ours():
        status = {r.check: r.status for r in report.results if r.layer == subject.reference}
        assert status.keys() == all_checks().keys()
        for check in (
            check for check in all_checks().values() if status[check.name] == "not offered"
        ):
            assert check.workers > workers or subject.lacks(check.needs)
        assert sum(s == "passed" for s in status.values()) >= (75 if workers == 1 else 90)
