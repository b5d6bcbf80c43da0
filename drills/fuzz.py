"""Random sequences of calls of both layers on live workers, compared with the float64 oracle.

    python -m drills.fuzz [--calls 20000] [--seed 0]

Prints how often each kind of call came and what went wrong; exit status 1 and the shortest failing
sequence if anything did. Every sequence has a deadline: workers that wait for each other are
reported, not waited for.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from drills.fuzz_calls import CALLS, WORKERS, Calls, draw_calls, traits
from drills.fuzz_rank import Plant, play
from syncnorm.testing import RankFailure, RankPool

TOGETHER = 10
"""Sequences in one call of the pool."""


class Verdict(NamedTuple):
    """The outcome of a sequence; empty if nothing was wrong."""

    sequence: Calls
    problems: list[str]
    is_hang: bool = False
    """True if workers waited for each other until the deadline, or broke off a message.

    The pool is started anew then.
    """


class Runner:
    """Workers that play sequences, started anew when a failure has ended them."""

    def __init__(
        self, plant: Plant = contextlib.nullcontext, timeout_seconds: float = 60.0
    ) -> None:
        self.plant = plant
        """A context manager, importable, in which the workers play: it may put a defect into the
        package.
        """
        self.timeout_seconds = timeout_seconds
        self._pool: RankPool | None = None

    def judge(self, sequences: Sequence[Calls]) -> list[Verdict]:
        """Play the sequences in one call of the pool; one by one, if that does not come back."""
        try:
            if self._pool is None or not self._pool.is_alive:
                self._pool = RankPool(WORKERS, timeout_seconds=self.timeout_seconds)
            by_rank = self._pool.run(play, list(sequences), self.plant)
        except RankFailure as failure:
            if len(sequences) == 1:
                return [Verdict(sequences[0], [str(failure)], not _has_raised(failure))]
            # Up to the first that fails: each of them costs a deadline and new workers.
            verdicts: list[Verdict] = []
            for each in sequences:
                verdicts += self.judge([each])
                if verdicts[-1].problems:
                    return verdicts
            # None fails alone: what failed together is not forgotten for that.
            text = f"only in one call with the sequences before it: {failure}"
            return [*verdicts[:-1], Verdict(sequences[-1], [text], not _has_raised(failure))]
        return [
            Verdict(sequence, [problem for problems in by_worker for problem in problems])
            for sequence, by_worker in zip(sequences, zip(*by_rank, strict=True), strict=True)
        ]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _has_raised(failure: RankFailure) -> bool:
    """True if a worker raised an error of its own, rather than one that follows from another's."""
    texts = failure.failures.values()
    lost = ("Timed out", "Connection closed", "process died", "ExchangeError", "Connection reset")
    return any(not any(word in text for word in lost) for text in texts)


def sequences(seed: int, count: int) -> Iterator[Calls]:
    """`count` sequences, the same for the same seed."""
    for index in range(count):
        # A seed for each: the tenth does not depend on how the ninth was drawn.
        yield draw_calls(seed * 1_000_003 + index)


def first_failure(
    runner: Runner, candidates: Sequence[Calls], together: int = TOGETHER
) -> Verdict | None:
    """The first of the sequences that fails."""
    for start in range(0, len(candidates), together):
        for verdict in runner.judge(candidates[start : start + together]):
            if verdict.problems:
                return verdict
    return None


def shorten(runner: Runner, failing: Verdict) -> Verdict:
    """Leave out calls for as long as the sequence still fails."""
    size = len(failing.sequence.calls) // 2
    while size:
        calls = failing.sequence.calls
        shorter = [
            dataclasses.replace(failing.sequence, calls=calls[:start] + calls[start + size :])
            for start in range(0, len(calls), size)
        ]
        found = first_failure(runner, [s for s in shorter if s.calls])
        if found is None:
            size //= 2
        else:
            failing, size = found, min(size, len(found.sequence.calls))
    return failing


class Tally:
    """The counts of calls played, by kind, and the first failure."""

    def __init__(self) -> None:
        self.kinds = Counter[str]()
        self.sequences = self.calls = self.mismatches = self.hangs = 0
        self.first: Verdict | None = None

    def add(self, verdict: Verdict) -> None:
        self.sequences += 1
        self.calls += len(verdict.sequence.calls)
        self.kinds.update(kind for call in verdict.sequence.calls for kind in traits(call) if kind)
        self.kinds[f"layer: {verdict.sequence.kind}"] += len(verdict.sequence.calls)
        self.hangs += verdict.is_hang
        self.mismatches += bool(verdict.problems) and not verdict.is_hang
        if verdict.problems and self.first is None:
            self.first = verdict

    def table(self, seconds: float) -> str:
        rows = [
            ("calls", self.calls), ("sequences", self.sequences), ("mismatches (sequences)", self.mismatches),
            ("hangs (sequences)", self.hangs), ("seconds", round(seconds)),
            ("sequences per second", round(self.sequences / seconds, 1)),
            *((f"calls: {kind}", count) for kind, count in sorted(self.kinds.items())),
        ]  # fmt: skip
        return "\n".join(
            ["| what | count |", "|---|---|", *(f"| {name} | {count} |" for name, count in rows)]
        )


def drill(runner: Runner, seed: int, count: int) -> Tally:
    """Play `count` sequences; ends with the first batch in which one fails."""
    tally = Tally()
    drawn = list(sequences(seed, count))
    for start in range(0, count, TOGETHER):
        for verdict in runner.judge(drawn[start : start + TOGETHER]):
            tally.add(verdict)
        if tally.first is not None:
            break
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m drills.fuzz", description="Fuzz both layers.")
    parser.add_argument("--calls", type=int, default=20_000, help=f"in sequences of {CALLS}")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    with Runner() as runner:
        tally = drill(runner, options.seed, -(-options.calls // CALLS))
        print(tally.table(time.perf_counter() - start), flush=True)
        if tally.first is not None:
            shortest = shorten(runner, tally.first)
            print(
                "\nThe shortest failing sequence:", shortest.sequence, *shortest.problems, sep="\n"
            )
            raise SystemExit(1)


if __name__ == "__main__":
    main()
