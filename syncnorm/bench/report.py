"""The figures of a benchmark, as they are written to a file."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from syncnorm import system
from syncnorm.bench import paired
from syncnorm.bench.candidates import LOCAL, Candidate
from syncnorm.bench.cases import Case
from syncnorm.bench.worker import COPY, Prepared


class _Part(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


class Ratio(_Part):
    """A ratio within the rounds."""

    median: float = Field(gt=0)
    low: float = Field(gt=0, description="Lower end of the median's 95 % interval.")
    high: float = Field(gt=0, description="Its upper end.")

    def __str__(self) -> str:
        return str(paired.Ratio(self.median, self.low, self.high))


class Result(_Part):
    """One layer in one case. Times are those of rank 0."""

    layer: str
    compiled: bool
    error: str | None = Field(default=None, description="In place of all that follows.")
    seconds: float | None = Field(default=None, description="Median of a step.")
    to_local: Ratio | None = Field(default=None, description="Step time over the local layer's.")
    bytes_per_second: float | None = Field(
        default=None,
        description="Five times the input's bytes over the step time; None for models.",
    )
    of_copy: Ratio | None = Field(default=None, description="bytes_per_second over that of a copy.")
    messages: int | None = Field(
        default=None, description="In a step; None where it cannot be told."
    )
    message_bytes: int | None = Field(default=None, description="Sent by rank 0 in a step.")
    peak_bytes: int | None = Field(
        default=None, description="Allocated at once in a step, at most."
    )

    @property
    def name(self) -> str:
        return Candidate(self.layer, self.compiled).name


class CaseResult(_Part):
    """One case. `calls` steps make a turn; a candidate has one turn in each of the `rounds`."""

    case: str
    kind: Literal["layer", "model"]
    shape: list[int]
    layout: Literal["contiguous", "channels last"]
    calls: int
    rounds: int
    copy_bytes_per_second: float | None = Field(
        default=None, description="Read and written by a copy of the input; None for models."
    )
    results: list[Result]


class Cut(_Part):
    """What was left out, and why."""

    what: str
    reason: str


class Report(_Part):
    """A whole benchmark."""

    version: Literal[1] = 1
    torch: str = torch.__version__
    machine: str
    device: str
    backend: str
    workers: int
    cores: int
    seconds: float = Field(default=0.0, description="Time that it took.")
    cases: list[CaseResult] = []
    cut: list[Cut] = []

    def errors(self) -> dict[str, str]:
        """The first error of each layer that has one, with its case."""
        found: dict[str, str] = {}
        for case in self.cases:
            for result in case.results:
                if result.error is not None:
                    found.setdefault(result.layer, f"{result.error} ({case.case})")
        return found


# What must be read and written at least, in sizes of the input: x, y; then g, x, x's gradient.
_STEP_BYTES, _COPY_BYTES = 5, 2


def summarise(
    case: Case,
    calls: int,
    seconds: Mapping[str, list[float]],
    prepared: Mapping[Candidate, Prepared],
    peaks: Mapping[str, int | None],
) -> CaseResult:
    """Figures of a case from the times of its rounds.

    Args:
        case: it.
        calls: in a turn.
        seconds: of a step in each round, by the candidate's name, and of a copy.
        prepared: by candidate; the local layer is among them.
        peaks: of memory, by the candidate's name.
    """
    size = 4 * torch.Size(case.shape).numel()
    copy = seconds.get(COPY)
    results = []
    for candidate, sent in prepared.items():
        times = seconds[candidate.name]
        result = Result(
            layer=candidate.layer,
            compiled=candidate.is_compiled,
            seconds=statistics.median(times),
            to_local=_ratio(times, seconds[LOCAL]),
            messages=sent.messages,
            message_bytes=sent.message_bytes,
            peak_bytes=peaks.get(candidate.name),
        )
        if copy is not None:
            result.bytes_per_second = _STEP_BYTES * size / statistics.median(times)
            result.of_copy = _ratio(
                [t * _STEP_BYTES for t in copy], [t * _COPY_BYTES for t in times]
            )
        results.append(result)
    return CaseResult(
        case=case.name,
        kind=case.kind,
        shape=list(case.shape),
        layout="channels last" if case.channels_last else "contiguous",
        calls=calls,
        rounds=len(seconds[LOCAL]),
        copy_bytes_per_second=None
        if copy is None
        else _COPY_BYTES * size / statistics.median(copy),
        results=results,
    )


def _ratio(of: Sequence[float], to: Sequence[float]) -> Ratio:
    return Ratio(**paired.ratio(list(of), list(to))._asdict())


def machine(device: str) -> str:
    """The processor's or the card's name."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).name
    return system.processor() or platform.processor() or platform.machine()


def cores() -> int:
    """The number of the machine's cores."""
    return os.cpu_count() or 1
