"""The figures of a benchmark for a person: a table for each case, and what was left out."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from syncnorm.bench.report import CaseResult, Report, Result

_COLUMNS = (
    *("layer", "time / local", "ms", "GB/s", "of copy", "messages", "bytes sent", "peak MiB"),
)

_WIDTH = 120


def print_head(report: Report) -> None:
    """Write what all tables have in common."""
    _write(
        f"{report.workers} worker(s), one thread each, {report.backend}; {report.device}: "
        f"{report.machine}, {report.cores} cores; torch {report.torch}\n"
        "median of the rounds' ratios [95 % interval]"
    )


def print_case(case: CaseResult) -> None:
    """Write a case's table."""
    table = Table(box=None, pad_edge=False)
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "layer" else "right", no_wrap=True)
    for result in case.results:
        if result.error is None:
            table.add_row(*_cells(result))
    copy = case.copy_bytes_per_second
    beside = "" if copy is None else f"; a copy moves {copy / 1e9:.1f} GB/s"
    _write(f"\n{case.case}: {case.rounds} rounds{beside}")
    # A row of figures is one line, also where that is longer than the screen is wide.
    Console(highlight=False, width=max(Console().width, _WIDTH)).print(table)


def print_end(report: Report) -> None:
    """Write what was cut."""
    _write(f"\n{report.seconds:.0f} seconds")
    for cut in report.cut:
        _write(f"left out: {cut.what}: {cut.reason}")


def _cells(result: Result) -> list[str]:
    return [
        result.name,
        str(result.to_local),
        f"{1e3 * (result.seconds or 0):.3g}",
        "-" if result.bytes_per_second is None else f"{result.bytes_per_second / 1e9:.2f}",
        "-" if result.of_copy is None else f"{result.of_copy.median:.2f}",
        "-" if result.messages is None else str(result.messages),
        "-" if result.message_bytes is None else str(result.message_bytes),
        "-" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.1f}",
    ]


def _write(text: str) -> None:
    Console(highlight=False, markup=False).print(text, soft_wrap=True)
