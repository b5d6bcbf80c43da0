"""The report of a verification, for a person and for a program."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from syncnorm.verify.check import Check, Verdict

_COLOURS = {
    "passed": "green",
    "failed": "red",
    "hangs": "red",
    "not offered": "dim",
    "not run": "yellow",
}


@dataclass(frozen=True)
class Result:
    """The outcome of one check of one layer."""

    layer: str
    theme: str
    check: str
    meaning: str
    status: str
    reason: str
    seconds: float


@dataclass
class Report:
    """All results.

    Args:
        workers: their number.
        backend: of their process group.
        device: on which they computed.
        results: in the order of the checks, layer by layer.
    """

    workers: int
    backend: str
    device: str
    results: list[Result] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """1 if a check failed, hangs or was not run, else 0."""
        return int(any(result.status in ("failed", "hangs", "not run") for result in self.results))

    def add(self, layer: str, check: Check, verdict: Verdict, seconds: float) -> Result:
        """Put a verdict on record."""
        words = (layer, check.theme, check.name, check.meaning, verdict.status, verdict.reason)
        self.results.append(Result(*words, round(seconds, 3)))
        return self.results[-1]

    def as_json(self) -> str:
        """One line, for --json."""
        facts: dict[str, Any] = {
            "torch": torch.__version__,
            **asdict(self),
            "exit_status": self.exit_status,
        }
        return json.dumps(facts)

    def summary(self) -> list[str]:
        """A line for each layer."""
        lines = []
        for layer in dict.fromkeys(result.layer for result in self.results):
            count = Counter(result.status for result in self.results if result.layer == layer)
            parts = [f"{count[status]} {status}" for status in _COLOURS if count[status]]
            lines.append(
                f"{layer} on {self.workers} worker(s), {self.backend}, {self.device}: "
                f"{', '.join(parts)}"
            )
        return lines


def print_result(result: Result) -> None:
    """Write a line for a check, with what is wrong below."""
    is_told = result.status in ("passed", "failed", "hangs")
    _print(result.status, f"{result.check:<30} {result.meaning if is_told else result.reason}")
    if is_told and result.reason:
        _print(result.status, f"{'':<30} -> {result.reason}", is_repeated=True)


def _print(status: str, text: str, is_repeated: bool = False) -> None:
    word = f"{'' if is_repeated else status:<11}"
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        print(f"{word} {text}", flush=True)
        return
    # A line is a line, also where it is longer than the screen is wide.
    Console(highlight=False).print(
        Text.assemble((word, _COLOURS[status]), " ", text), soft_wrap=True
    )
