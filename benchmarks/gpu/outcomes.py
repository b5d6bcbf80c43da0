"""A plugin of pytest: each test's outcome is written down when it is known, for a run cut off.

A run that is given the file of one that broke goes on with the tests that were not begun.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.part import Settings, is_device_lost, read_rows


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="the file for the outcomes")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcomes(Settings(config.getoption("--outcomes"))))


class Outcomes:
    """Writes a row when a test begins, and one when it has ended."""

    def __init__(self, settings: Settings) -> None:
        self._write = settings.write
        self._before = {row["test"] for row in read_rows(settings.rows) if "test" in row}

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        begun = [item for item in items if item.nodeid in self._before]
        items[:] = [item for item in items if item.nodeid not in self._before]
        config.hook.pytest_deselected(items=begun)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._write(collected=len(session.items))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            why = _last_line(report)
            # Of the trainer's tests some need packages that a bare machine lacks.
            outcome = "skipped" if "ModuleNotFoundError" in why else "failed"
            self._write(test=report.nodeid, outcome=outcome, why=why)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(test=nodeid, outcome="not finished")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test that passes has three phases of which one counts; another ends in any of them.
        if report.when == "call" or report.outcome != "passed":
            why = "" if report.outcome == "passed" else _last_line(report)
            row = {"test": report.nodeid, "outcome": report.outcome, "why": why}
            self._write(**row, seconds=round(report.duration, 3))
        if report.failed and is_device_lost():
            pytest.exit("the device is lost to this process", DEVICE_LOST)


DEVICE_LOST = 77
"""The exit status after an error that the device does not survive in this process."""


def _last_line(report: pytest.CollectReport | pytest.TestReport) -> str:
    """The error in a line, or the reason of a skip."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2]
    lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
    return (lines or str(report.longrepr).splitlines() or [""])[-1][:400]
