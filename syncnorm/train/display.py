"""The screen of a run: a line per epoch and, on a terminal, a progress bar below."""

from contextlib import suppress
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LEAST_BAR, _MOST_BAR = 10, 40
# What stands beside bar, count and figures: "training", "steps", the time that is left ("1:23:45"),
# and a blank before each of the five columns on the right.
_BESIDE = len("training") + len("steps") + len("1:23:45") + 5


class Screen(Console):
    """Standard error, whose reader may go away: then nothing is shown any more."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Display:
    """Shows a run on standard error, so that standard output holds nothing but its result.

    Bar, count and the time that is left are always there; of the figures as many as the terminal is
    wide enough for.

    Args:
        total_steps: optimizer steps of the run.
        done: steps done before, when a run is resumed.
        is_pooled: True if there is anybody to exchange with.
        quiet: True to show nothing, as on all workers but the first.
    """

    def __init__(
        self, total_steps: int, *, done: int = 0, is_pooled: bool = True, quiet: bool
    ) -> None:
        self._console = Screen(stderr=True, quiet=quiet, highlight=False)
        self._is_shown = not quiet and self._console.is_terminal
        self._is_pooled = is_pooled
        self._count_width = 2 * len(str(total_steps)) + 1
        self._figures: dict[str, str] = {}
        self._bar = BarColumn(_LEAST_BAR)
        self._progress = Progress(
            TextColumn("[bold]training"),
            self._bar,
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
        self._show()

    def __enter__(self) -> Self:
        with suppress(OSError):
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._progress.stop()

    def print_line(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        # soft_wrap: a log file has no width at which to break lines
        with suppress(OSError):  # a full disk does not end a run
            self._console.print(line, soft_wrap=True, markup=False)

    def advance(self, step: int, loss: float) -> None:
        """Show that a step is done, and its loss."""
        if self._is_shown:
            self._progress.update(self._task, completed=step)
            self._figures["loss"] = f"loss {loss:.4f}"
            self._show()

    def show_speed(self, samples_per_second: float, exchange_share: float) -> None:
        """Show the speed, and the share of time spent in exchanges if there are any."""
        if self._is_shown:
            self._figures["speed"] = f"{samples_per_second:.0f} samples/s"
            if self._is_pooled:
                self._figures["exchanges"] = f"{100 * exchange_share:.0f} % exchanging"
            self._show()

    def _show(self) -> None:
        """Fit the figures into the width of the terminal, and give the bar what is left."""
        room = self._console.width - _BESIDE - self._count_width
        figures = ""
        for name in ("loss", "speed", "exchanges"):
            longer = "  ".join(filter(None, [figures, self._figures.get(name, "")]))
            if len(longer) > room - _LEAST_BAR:
                break
            figures = longer
        self._bar.bar_width = min(_MOST_BAR, max(1, room - len(figures)))
        self._progress.update(self._task, figures=figures)
