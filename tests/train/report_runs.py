"""Folders of runs to report on: from single events, or whole examples that look like real ones.

python -m tests.train.report_runs FOLDER    writes three examples and a page that compares them
"""

import json
import math
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from syncnorm.train.config import strict_yaml
from syncnorm.train.report import write_report

BEGIN = 1_760_000_000.0
SAMPLES = 1437
CONFIG: dict[str, Any] = {
    "model": {"name": "digits_resnet"},
    "data": {"name": "digits"},
    "norm": {"name": "sync_batch_norm", "sync": "batch", "rules": {}, "eps": 1e-05},
    "train": {
        "epochs": 24,
        "global_batch": 64,
        "lr": 0.1,
        "seed": 0,
        "optimizer": {"name": "SGD", "momentum": 0.9},
    },
    "launch": {"workers": 2, "device": "cpu"},
    "run_dir": "runs",
}
LAYERS = [
    "stem.1",
    *(
        f"stage{stage}.{block}.norm{norm}"
        for stage in (1, 2, 3)
        for block in (0, 1)
        for norm in (1, 2)
    ),
    "head.0",
]


def write_run(
    folder: Path,
    events: Iterable[dict[str, Any]],
    *,
    config: dict[str, Any] | None = None,
    status: str | None = "done",
    reason: str = "",
    tail: str = "",
) -> Path:
    """Write a run's folder.

    Args:
        folder: is made.
        events: the lines of `metrics.jsonl`.
        config: `CONFIG` if None.
        status: of `exit.json`; None for a run without one.
        reason: of `exit.json`.
        tail: what follows the last line.
    """
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        strict_yaml.dump(CONFIG if config is None else config), encoding="utf-8"
    )
    lines = [json.dumps(event) + "\n" for event in events]
    (folder / "metrics.jsonl").write_text("".join(lines) + tail, encoding="utf-8")
    if status is not None:
        note = {"status": status, "reason": reason, "step": 0, "exit_code": 0}
        (folder / "exit.json").write_text(json.dumps(note) + "\n", encoding="utf-8")
    return folder


def step(number: int, loss: float | str = 1.0) -> dict:
    return {"event": "step", "step": number, "loss": loss, "lr": 0.1}


def interval(number: int, speed: float, share: float) -> dict:
    return {
        "event": "interval",
        "time": BEGIN + number,
        "step": number,
        "samples_per_second": speed,
        "exchange_share": share,
    }


def epoch(number: int, accuracy: float) -> dict:
    return {
        "event": "epoch",
        "time": BEGIN + number,
        "epoch": number,
        "step": number,
        "test_accuracy": accuracy,
    }


def start(
    time: float = 0.0, number: int = 0, workers: int = 2, resumed_from: str | None = None
) -> dict:
    return {
        "event": "start",
        "time": BEGIN + time,
        "step": number,
        "world_size": workers,
        "resumed_from": resumed_from,
    }


@dataclass
class Example:
    """The course of a run as a trainer would write it down, made up.

    Args:
        seed: of the noise.
        workers: number of workers.
        epochs: of the run.
        floor: of the loss.
        best: test accuracy that it comes near to.
        speed: samples per second.
        share: of the time that exchanges take.
        between: share of the variance between workers.
        renorm: record r_clipped and d_clipped.
        every: steps between records of speed and layers.
    """

    seed: int = 0
    workers: int = 2
    epochs: int = 24
    floor: float = 0.004
    best: float = 0.988
    speed: float = 2100.0
    share: float = 0.11
    between: float = 0.03
    renorm: bool = False
    every: int = 10

    def __post_init__(self) -> None:
        self.noise = random.Random(self.seed)
        self.time = BEGIN
        self.steps_per_epoch = math.ceil(SAMPLES / 64)
        self.total = self.epochs * self.steps_per_epoch

    def start(self, step: int = 0, resumed_from: str | None = None) -> dict[str, Any]:
        """The first event, or that of a restart."""
        self.time += 3
        return {
            "event": "start",
            "time": self.time,
            "step": step,
            "world_size": self.workers,
            "device": "cpu",
            "resumed_from": resumed_from,
            "versions": {"syncnorm": "0.1.0", "torch": "2.13.0", "python": "3.11.9"},
            "parameters": 77754,
            "placement": "\n".join(
                f"rank {rank}  host-{rank // 2}  cpu  32 samples" for rank in range(self.workers)
            ),
        }

    def course(self, first: int, last: int) -> Iterator[dict[str, Any]]:
        """Everything from the step after `first` to `last`."""
        for step in range(first + 1, last + 1):
            seconds = 64 / self.speed * self.noise.uniform(0.9, 1.2)
            self.time += seconds
            yield self._step(step)
            if step % self.every == 0:
                yield from self._interval(step, seconds)
            if step % self.steps_per_epoch == 0:
                yield from self._epoch(step)

    def fault(self, step: int, kind: str, message: str) -> dict[str, Any]:
        """Something that went wrong."""
        return {"event": "fault", "time": self.time, "step": step, "kind": kind, "message": message}

    def end(self) -> dict[str, Any]:
        """The last event of a run that ends well."""
        return {
            "event": "end",
            "time": self.time,
            "step": self.total,
            "test_accuracy": self.best,
            "digests": ["a"] * self.workers,
        }

    def rate(self, step: int) -> float:
        """Warm-up, then a cosine."""
        warmup = 0.15 * self.total
        progress = (step - warmup) / (self.total - warmup)
        return (
            0.1 * step / warmup
            if step < warmup
            else 0.05 * (1 + math.cos(math.pi * min(progress, 1)))
        )

    def _step(self, step: int) -> dict[str, Any]:
        decayed = 2.3 * math.exp(-9 * step / self.total) + self.floor
        loss = decayed * math.exp(self.noise.gauss(0, 0.28))
        return {
            "event": "step",
            "step": step,
            "loss": loss,
            "lr": self.rate(step),
            "grad_norm": 2.4 * math.sqrt(loss),
        }

    def _interval(self, step: int, seconds: float) -> Iterator[dict[str, Any]]:
        yield {
            "event": "interval",
            "time": self.time,
            "step": step,
            "samples_per_second": self.speed
            * self.noise.gauss(1, 0.05)
            * (0.6 if step <= self.every else 1),
            "exchange_share": self.share * self.noise.uniform(0.8, 1.3),
            "seconds": self.every * seconds,
        }
        yield {
            "event": "layers",
            "step": step,
            "layers": {name: self._layer(step, place) for place, name in enumerate(LAYERS)},
        }

    def _layer(self, step: int, place: int) -> dict[str, Any]:
        early, depth = math.exp(-6 * step / self.total), place / len(LAYERS)
        return {
            "count": 4096 >> (place // 5),
            "between_share": self.between * (0.3 + 1.4 * depth) * self.noise.uniform(0.7, 1.3),
            "r_clipped": max(0.0, self.noise.gauss(0.3 * early * depth, 0.02))
            if self.renorm
            else None,
            "d_clipped": max(0.0, self.noise.gauss(0.2 * early * (1 - depth), 0.02))
            if self.renorm
            else None,
            "mean_gap": 0.08 + 1.5 * early * self.noise.uniform(0.5, 1.5) * (1 - 0.6 * depth),
            "var_gap": 0.05 + 0.9 * early * self.noise.uniform(0.4, 1.6) * (0.4 + depth),
        }

    def _epoch(self, step: int) -> Iterator[dict[str, Any]]:
        epoch = step // self.steps_per_epoch
        accuracy = (
            self.best - 0.88 * math.exp(-9 * step / self.total) - abs(self.noise.gauss(0, 0.004))
        )
        yield {
            "event": "epoch",
            "time": self.time,
            "epoch": epoch,
            "step": step,
            "loss": 2.3 * math.exp(-9 * step / self.total),
            "test_accuracy": accuracy,
            "lr": self.rate(step),
            "seconds": self.steps_per_epoch * 64 / self.speed,
        }
        yield {
            "event": "checkpoint",
            "time": self.time,
            "step": step,
            "path": f"step-{step:08}",
            "seconds": 0.08,
        }


def changed(**changes: Any) -> dict[str, Any]:
    """`CONFIG` with other values for dotted keys, dots written as two underscores."""
    config = json.loads(json.dumps(CONFIG))
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    return config


def write_examples(folder: Path) -> list[Path]:
    """Three runs: one that went well, one that lost a worker and went on, one that failed."""
    whole = Example(seed=1)
    lost = Example(seed=2, workers=4, best=0.991, speed=3600, share=0.19, between=0.09, renorm=True)
    broken = Example(seed=3, best=0.94, speed=2400, share=0.02, between=0.30, floor=0.06)
    at, again = 13 * whole.steps_per_epoch + 9, 13 * whole.steps_per_epoch
    stop = 17 * whole.steps_per_epoch + 4
    return [
        write_run(
            folder / "digits-20251009-101500",
            [whole.start(), *whole.course(0, whole.total), whole.end()],
        ),
        write_run(
            folder / "digits_renorm-20251009-104200",
            [
                lost.start(),
                *lost.course(0, at),
                lost.fault(
                    at, "restart", "worker 3 was killed by SIGKILL; the 4 workers start again"
                ),
                lost.start(again, f"step-{again:08}"),
                *lost.course(again, lost.total),
                lost.end(),
            ],
            config=changed(norm__name="sync_batch_renorm", launch__workers=4),
        ),
        write_run(
            folder / "digits_local-20251009-111000",
            [
                broken.start(),
                *broken.course(0, stop),
                {
                    "event": "step",
                    "step": stop + 1,
                    "loss": "nan",
                    "lr": broken.rate(stop),
                    "grad_norm": "nan",
                },
                broken.fault(
                    stop + 1,
                    "not_finite",
                    f"the loss of step {stop + 1} is nan; train.not_finite is stop",
                ),
            ],
            config=changed(norm__sync="none", train__lr=0.4),
            status="failed",
            reason=f"the loss of step {stop + 1} is nan",
        ),
    ]


if __name__ == "__main__":
    print(write_report(write_examples(Path(sys.argv[1])), Path(sys.argv[1]) / "report.html"))
