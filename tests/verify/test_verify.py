"""Our layers pass every check that they claim, on any number of workers."""

from __future__ import annotations

import pytest

from syncnorm.verify import LocalRunner, ours, verify
from syncnorm.verify.checks import all_checks


@pytest.mark.parametrize(
    "workers", [1, 3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))]
)
def test_our_layers_pass_all_that_they_claim(workers):
    with LocalRunner(workers, 600.0) as runner:
        report = verify(runner, ours())
    assert report.exit_status == 0, [
        r for r in report.results if r.status not in ("passed", "not offered")
    ]
    for under_test in ours():
        status = {r.check: r.status for r in report.results if r.layer == under_test.reference}
        assert status.keys() == all_checks().keys()
        for check in (
            check for check in all_checks().values() if status[check.name] == "not offered"
        ):
            assert check.workers > workers or under_test.lacks(check.needs)
        assert sum(s == "passed" for s in status.values()) >= (75 if workers == 1 else 90)
