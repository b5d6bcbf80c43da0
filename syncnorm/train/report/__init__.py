"""`syncnorm report`: one self-contained HTML page that compares runs.

    run folders -> run, events (the records) -> summary, curves, heatmaps (SVG) -> page, page.html

page.html is a Jinja2 template which escapes all values, so text from a run's folder stays text. The
page needs no script, and nothing in it is loaded from elsewhere.
"""

from collections.abc import Sequence
from pathlib import Path

from syncnorm.errors import ConfigError
from syncnorm.train.files import write_text_whole
from syncnorm.train.report.run import read_runs


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Write a page that compares runs; the same folders give the same bytes.

    Args:
        runs: folders of runs, finished or not.
        output: the page; one that exists is replaced.

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
    page = render_page(read)
    try:
        write_text_whole(output, page)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ConfigError(
            f"`output` must be a file that can be written, got {str(output)!r}: {error}"
        ) from None
    return output
