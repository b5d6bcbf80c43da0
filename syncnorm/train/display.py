"""What a person sees of a run while it goes on: a line per epoch and, on a terminal, a progress bar below."""

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Follow a run on standard error, so that standard output holds nothing but its result.

    Args:
        total_steps: optimizer steps of the run.
        quiet: show nothing, as on all workers but the first.
    """

    def __init__(self, total_steps: int, *, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            # The drawing thread shares its core with a worker.
            refresh_per_second=4,
            transient=True,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._progress.add_task("steps", total=total_steps)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        # soft_wrap: a log file has no width at which to break lines
        self._console.print(line, soft_wrap=True, markup=False)

    def advance(self) -> None:
        """Count a step."""
        self._progress.advance(self._task)
