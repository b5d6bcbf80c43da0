"""The command `syncnorm diagnose`: in this process, on workers of its own, or under torchrun."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from syncnorm.diagnose import MEASURES
from syncnorm.diagnose.diagnosis import choose
from syncnorm.errors import ConfigError, InputError
from syncnorm.run.env import Launched
from syncnorm.run.joining import joined
from syncnorm.run.own_workers import check_device, run_on
from syncnorm.train.config.schema import Config
from syncnorm.train.display import Screen
from syncnorm.train.files import write_text_whole
from syncnorm.train.finished.diagnose import RunDiagnosis, diagnose_run
from syncnorm.train.finished.load import read_run
from syncnorm.train.report.text import duration

NAME = "diagnosis"


@dataclass(frozen=True)
class Request:
    """A diagnosis as the command line asks for it.

    Args:
        run: its folder.
        checkpoint: its name.
        only: names of measures; None: all.
        batches: to look at.
        allowed: packages whose callables the configuration may name.
        device: auto, cpu or cuda.
    """

    run: Path
    checkpoint: str
    only: Sequence[str] | None
    batches: int
    allowed: tuple[str, ...]
    device: str


def run_diagnose(request: Request, workers: int | None, launched: Launched | None) -> None:
    """Diagnose a run, write `diagnosis.json` and a page into its folder, and print the advice.

    Args:
        request: what to diagnose.
        workers: to start on this machine; None: this process alone.
        launched: this worker's rank; None outside a launcher.

    Raises:
        ConfigError: bad input; see `diagnose_run`.
        RunError: code that the configuration names failed, or a worker was lost.
    """
    check_device(request.device)
    try:
        choose(request.only, has_early=True)
    except InputError as error:
        raise ConfigError(str(error).replace("`only`", "`--only`")) from None
    config = read_run(request.run, request.allowed)
    is_first = launched is None or launched.rank == 0
    if is_first and not os.access(request.run, os.W_OK):
        raise ConfigError(f"run {str(request.run)!r} must be writable, for {NAME}.json")
    run_on(partial(_diagnose, request, config), workers, launched, request.device)


def _diagnose(request: Request, config: Config, launched: Launched | None) -> None:
    with joined(config, request.device, launched) as workers:
        with _Bar(quiet=not workers.is_first) as bar:
            found = diagnose_run(
                request.run,
                config,
                workers,
                request.checkpoint,
                request.batches,
                request.only,
                request.allowed,
                bar.begin,
            )
        if workers.is_first:
            _write(request.run, found)


def _write(folder: Path, found: RunDiagnosis) -> None:
    text = json.dumps(asdict(found), indent=1, allow_nan=False) + "\n"
    try:
        write_text_whole(folder / f"{NAME}.json", text)
        written = _write_page(folder, found) or folder / f"{NAME}.json"
    except OSError as error:
        raise ConfigError(f"run {str(folder)!r} cannot be written to: {error}") from None
    for each in found.advice or [{"text": "nothing stands out"}]:
        print(f"- {each['text']}")
    print(written, flush=True)


def _write_page(folder: Path, found: RunDiagnosis) -> Path | None:
    """Write the page; None, and a line on standard error, where what draws it is missing."""
    try:
        from syncnorm.train.report.diagnosis import write_page
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("jinja2", "matplotlib"):
            raise
        print(
            f"no page: it needs {missing}. Install it with: pip install 'syncnorm[report]'",
            file=sys.stderr,
        )
        return None
    return write_page(asdict(found), folder / f"{NAME}.html")


class _Bar:
    """Shows on standard error how long a diagnosis will take and, on a terminal, how far it is."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Screen(stderr=True, quiet=quiet, highlight=False)
        self._progress = Progress(
            TextColumn("[bold]diagnosing"),
            BarColumn(40),
            TextColumn("{task.percentage:3.0f} %"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            refresh_per_second=4,
            transient=True,
            disable=quiet or not self._console.is_terminal,
        )

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, costs: dict[str, int], seconds: float) -> Callable[[int], object]:
        """Say what is coming, and return what moves the bar."""
        total = sum(costs.values())
        shares = ", ".join(
            f"{MEASURES[name].title} {duration(seconds * cost / max(1, total))}"
            for name, cost in costs.items()
        )
        self._console.print(f"about {duration(seconds)}: {shares}", soft_wrap=True, markup=False)
        task = self._progress.add_task("diagnosing", total=total)
        self._progress.start()
        return lambda cost: self._progress.advance(task, cost)
