"""A plugin of pytest: each test's outcome is written down when it is known, for a run cut off.

A run that is given the file of one that broke goes on with the tests that were not begun. A test
that hangs ends the process, with the stacks of its threads in the log; no test begins when the time
is over.
"""

from __future__ import annotations

import faulthandler
import shlex

import pytest

from benchmarks.gpu.part import Settings, from_arguments, is_device_lost, read_rows

# A test that takes longer hangs: the first of a process may compile for a minute.
MOST_SECONDS = 140.0
OVER = "the time is over"
# All have passed, some have failed, none were left.
ENDED_BY_ITSELF = (0, 1, 5)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--settings", help="the arguments of a part")


def pytest_configure(config: pytest.Config) -> None:
    given = shlex.split(config.getoption("--settings"))
    config.pluginmanager.register(Outcomes(from_arguments(given)))


class Outcomes:
    """Writes a row when a test begins, and one when it has ended."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._write = settings.write
        self._before = {row["test"] for row in read_rows(settings.rows) if "test" in row}
        self._log = settings.rows.with_suffix(".log").open("a")

    # After the project's own order, which is made for another machine.
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Take the files in the order of the command, and leave out what was begun before."""
        order = {
            (config.rootpath / name).resolve(): place for place, name in enumerate(config.args)
        }
        begun = [item for item in items if item.nodeid in self._before]
        items[:] = [item for item in items if item.nodeid not in self._before]
        items.sort(key=lambda item: order.get(item.path.resolve(), len(order)))
        config.hook.pytest_deselected(items=begun)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._session, self._left = session, len(session.items)
        number = self._left + len(self._before)
        self._write(collected=number, by=self._settings.rows.stem)
        self._stop_if_over()

    def _stop_if_over(self) -> None:
        if self._left and self._settings.left <= 0.0:
            self._session.shouldstop = OVER

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            why = _last_line(report)
            # Of the trainer's tests some need packages that a bare machine lacks.
            outcome = "skipped" if "ModuleNotFoundError" in why else "failed"
            self._write(test=report.nodeid, outcome=outcome, why=why)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(test=nodeid, outcome="not finished")
        self._left -= 1
        self._set_timer()

    # pytest takes the timer off after a failure, and fixtures are still to be torn down.
    @pytest.hookimpl(trylast=True)
    def pytest_exception_interact(self) -> None:
        self._set_timer()

    def _set_timer(self) -> None:
        # Stacks are wanted as well where the part's time is over before.
        left = max(1.0, self._settings.left)
        hangs = left > MOST_SECONDS
        faulthandler.dump_traceback_later(min(left, MOST_SECONDS), exit=hangs, file=self._log)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test that passes has three phases of which one counts; another ends in any of them.
        if report.when == "call" or report.outcome != "passed":
            why = "" if report.outcome == "passed" else _last_line(report)
            row = {"test": report.nodeid, "outcome": report.outcome, "why": why}
            self._write(**row, seconds=round(report.duration, 3))
        if report.failed and is_device_lost():
            pytest.exit("the device is lost to this process", DEVICE_LOST)

    def pytest_runtest_logfinish(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._stop_if_over()

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        faulthandler.cancel_dump_traceback_later()
        if session.shouldstop == OVER:
            self._write(ended="early")
        elif exitstatus in ENDED_BY_ITSELF:
            self._write(ended="whole")


DEVICE_LOST = 77
"""The exit status after an error that the device does not survive in this process."""


def _last_line(report: pytest.CollectReport | pytest.TestReport) -> str:
    """The error in a line, or the reason of a skip."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2]
    lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
    return (lines or str(report.longrepr).splitlines() or [""])[-1][:400]
