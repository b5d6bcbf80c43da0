"""The progress of a run in a notebook's cell, read from the run's `metrics.jsonl`.

Workers are other processes, and may be started again: what they have done is in the file.
"""

import html
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from syncnorm.train.files import open_regular
from syncnorm.train.task.measures import format_metric

_LOOK_SECONDS = 0.25
_LINES = 12


def is_notebook() -> bool:
    """Return True where output appears below a cell: under IPython's kernel."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel")


class Follower:
    """Shows a run below the cell, in a thread of its own, until the block ends."""

    def __init__(self) -> None:
        self._view = CellView()
        self._path: Path | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._read = 0

    def begin(self, folder: Path) -> None:
        """Follow the run in this folder from now on; what it did before is not shown again."""
        self._path = folder / "metrics.jsonl"
        self._read = len(self._whole_lines())

    def __enter__(self) -> Self:
        from IPython.display import display

        self._handle: Any = display(self._view, display_id=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            self._look()
        self._look()

    def _look(self) -> None:
        events = self._new_events()
        for event in events:
            self._view.take(event)
        if events:
            self._handle.update(self._view)

    def _new_events(self) -> list[dict[str, Any]]:
        whole = self._whole_lines(self._read)
        self._read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def _whole_lines(self, begin: int = 0) -> bytes:
        """Read the events from a byte on, without a line that is being written."""
        if self._path is None or not self._path.exists():
            return b""
        try:
            with open_regular(self._path, follows_links=True) as file:
                file.seek(begin)
                text = file.read()
        except OSError:
            return b""  # the run tells of it
        return text[: text.rfind(b"\n") + 1]


class CellView:
    """What is to be seen of a run: a bar, and a line for each epoch."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._step, self._steps, self._figures = 0, 0, "starting workers"

    def take(self, event: Mapping[str, Any]) -> None:
        """Take in an event of `metrics.jsonl`."""
        match event["event"]:
            case "start":
                self._step, self._steps = event["step"], event["steps"]
                self._figures = f"{event['world_size']} worker(s), {event['device']}"
            case "step":
                self._step = event["step"]
                self._figures = f"loss {float(event['loss']):.4f}"
            case "epoch":
                self._lines.append(_describe_epoch(event))
            case "fault":
                self._lines.append(event["message"])
            case "end" | "stop":
                self._lines.append("done" if event["event"] == "end" else "stopped, saved")
            case _:
                pass

    def __repr__(self) -> str:
        width = 30
        done = width * self._step // max(self._steps, 1)
        bar = "█" * done + "·" * (width - done)
        shown = self._lines[-_LINES:]
        return "\n".join([*shown, f"{bar} {self._step}/{self._steps} steps  {self._figures}"])

    def _repr_html_(self) -> str:
        lines = "".join(f"<div>{html.escape(line)}</div>" for line in self._lines[-_LINES:])
        figures = html.escape(f"{self._step}/{self._steps} steps  {self._figures}")
        return (
            f"<div style='font-family: monospace; white-space: pre-wrap'>{lines}"
            f"<progress value='{self._step}' max='{max(self._steps, 1)}'></progress> {figures}</div>"
        )


def _describe_epoch(event: Mapping[str, Any]) -> str:
    metrics = "".join(
        f"  {name.replace('_', ' ', 1)} {value}" for name, value in _judged(event).items()
    )
    return f"epoch {event['epoch']}  step {event['step']}  loss {float(event['loss']):.4f}{metrics}"


def _judged(event: Mapping[str, Any]) -> dict[str, str]:
    """Write the first metric of each split: it is the one that decides."""
    found: dict[str, str] = {}
    for split in ("validation", "test"):
        names = [name for name in event if name.startswith(f"{split}_")]
        if names:
            value = float(event[names[0]])
            found[split] = format_metric(names[0].removeprefix(f"{split}_"), value)
    return found
