"""The screen of a run: a line per epoch and, on a terminal, a progress bar below."""

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Shows a run on standard error, so that standard output holds nothing but its result.

    Args:
        total_steps: optimizer steps of the run.
        done: steps done before, when a run is resumed.
        quiet: True to show nothing, as on all workers but the first.
    """

    def __init__(self, total_steps: int, *, done: int = 0, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._is_shown = not quiet and self._console.is_terminal
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            # The drawing thread shares its core with a worker.
            refresh_per_second=4,
            transient=True,
            disable=not self._is_shown,
        )
        self._task = self._progress.add_task("steps", total=total_steps, completed=done, figures="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def print_line(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        # soft_wrap: a log file has no width at which to break lines
        self._console.print(line, soft_wrap=True, markup=False)

    def advance(self, step: int, loss: float) -> None:
        """Show that a step is done, and its loss."""
        if self._is_shown:
            self._progress.update(self._task, completed=step)
            self._progress.tasks[0].fields["loss"] = f"loss {loss:.4f}"
            self._show()

    def show_speed(self, samples_per_second: float, exchange_share: float) -> None:
        """Show the speed, and the share of time spent in exchanges."""
        if self._is_shown:
            self._progress.tasks[0].fields["speed"] = (
                f"  {samples_per_second:.0f} samples/s  {100 * exchange_share:.0f} % exchanging"
            )
            self._show()

    def _show(self) -> None:
        fields = self._progress.tasks[0].fields
        fields["figures"] = fields.get("loss", "") + fields.get("speed", "")
