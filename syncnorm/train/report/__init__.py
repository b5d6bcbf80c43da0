"""`syncnorm report`: one self-contained HTML page that compares runs.

    run folders -> run, events (the records) -> summary, curves, heatmaps (SVG) -> page, page.html

page.html is a Jinja2 template which escapes all values, so text from a run's folder stays text. The
page needs no script, and nothing in it is loaded from elsewhere.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from syncnorm.errors import ConfigError
from syncnorm.train.files import write_text_whole
from syncnorm.train.report.run import read_runs

_log = logging.getLogger(__name__)

REFRESH_SECONDS = 10


def watch_report(
    runs: Sequence[Path], output: Path, wait: Callable[[float], object] = time.sleep
) -> Path:
    """Write the page again while runs go on; it reloads itself. Returns when all have ended.

    Args:
        runs: folders of runs.
        output: the page.
        wait: called with the seconds between two looks at the folders.

    Raises:
        ConfigError: as by `write_report`.
    """
    seen = None
    with suppress(KeyboardInterrupt):
        while any(not (run / "exit.json").exists() for run in runs):
            now = [_size(run / "metrics.jsonl") for run in runs]
            if now != seen:
                write_report(runs, output, refresh_seconds=REFRESH_SECONDS)
                seen = now
            wait(REFRESH_SECONDS)
    return write_report(runs, output)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def write_own_report(folder: Path) -> None:
    """Write a page about a run into its folder, where that can be done; a fault is only logged."""
    try:
        write_report([folder], folder / "report.html")
    except Exception as error:  # a page is never worth a run
        _log.info("no report: %s", error)


def write_report(runs: Sequence[Path], output: Path, *, refresh_seconds: int | None = None) -> Path:
    """Write a page that compares runs; the same folders give the same bytes.

    Args:
        runs: folders of runs, finished or not.
        output: the page; one that exists is replaced.
        refresh_seconds: after which a browser reloads the page; None: never.

    Returns:
        `output`.

    Raises:
        ConfigError: no runs, a folder that is no run or that cannot be read, an output that cannot
            be written, or matplotlib is missing.
    """
    read = read_runs(runs)
    try:
        # Here, because only the page needs these packages, and matplotlib takes a second.
        from syncnorm.train.report.page import render_page
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("jinja2", "matplotlib"):
            raise
        raise ConfigError(
            f"a report needs {missing}. Install it with: pip install 'syncnorm[report]'"
        ) from None
    page = render_page(read, refresh_seconds)
    try:
        write_text_whole(output, page)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ConfigError(
            f"`output` must be a file that can be written, got {str(output)!r}: {error}"
        ) from None
    return output
