"""A program that trains its own network on its own data by `syncnorm.fit`; prints JSON.

    python -m tests.launch.fit_program whole|stop|interrupt|threads|torchrun

Not a test itself: workers are forked from it, which pytest's threads would prevent.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import syncnorm
from syncnorm.train.data.splits import Splits
from syncnorm.train.loop import Run

CONFIG = {
    "train": {
        "epochs": 3,
        "global_batch": 10,
        "lr": 0.1,
        "dtype": "float64",
        "schedule": {"name": "ConstantLR"},
        "optimizer": {"name": "SGD", "momentum": 0.9},
    },
    "launch": {"workers": 2},
    "follow": {"layers": False},
}


def rows(count: int, seed: int) -> TensorDataset:
    """Make samples (5,) of three numbers that follow from them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.stack([x.sum(1), x.prod(1), x[:, 0]], dim=1))


class Distance:
    """A task: the sum of squared distances."""

    best = "-distance"

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        """Sum over samples of the squared distance."""
        x, target = batch
        return (model(x) - target).square().sum(), len(x)

    def metrics(
        self, model: nn.Module, batch: tuple[Tensor, Tensor]
    ) -> dict[str, tuple[Tensor, int]]:
        """Measure the squared distance."""
        total, count = self.loss(model, batch)
        return {"distance": (total, count)}


class Points(syncnorm.Callback):
    """Writes down each point that is reached, into a file of the worker's own."""

    def __init__(self, folder: Path, stops_after: int | None = None) -> None:
        self.folder = folder
        self.stops_after = stops_after

    def _note(self, run: Run, *words: object) -> None:
        with (self.folder / f"points-{run.workers.rank}.txt").open("a") as file:
            print(*words, file=file)

    def on_start(self, run: Run) -> None:
        self._note(run, "start", run.progress.step)

    def on_step(self, run: Run, loss: float) -> None:
        self._note(run, "step", run.progress.step, loss)
        # One worker's word is enough.
        if run.progress.step == self.stops_after and run.workers.is_first:
            run.stop("it is good enough")

    def on_evaluation(self, run: Run, split: str, metrics: Mapping[str, float]) -> None:
        self._note(run, "evaluation", split, metrics["distance"])

    def on_epoch(self, run: Run, loss: float) -> None:
        self._note(run, "epoch", run.progress.epoch)

    def on_end(self, run: Run, metrics: Mapping[str, Mapping[str, float]]) -> None:
        self._note(run, "end", *metrics)


class Interrupting(syncnorm.Callback):
    """Presses Ctrl-C in the program after the second step."""

    def on_step(self, run: Run, loss: float) -> None:
        if run.progress.step == 2 and run.workers.is_first:
            os.kill(os.getppid(), signal.SIGINT)


class Failing(syncnorm.Callback):
    """Fails in the second step."""

    def on_step(self, run: Run, loss: float) -> None:
        if run.progress.step == 2:
            raise RuntimeError("the callback is broken")


def main(what: str) -> None:
    """Train, and print what came of it."""
    here = Path.cwd()
    width = 4

    def net(norm_layer) -> nn.Module:
        return nn.Sequential(nn.Linear(5, width), norm_layer(width), nn.ReLU(), nn.Linear(width, 3))

    data = Splits(rows(48, 0), rows(12, 1), rows(12, 2))
    own = {"dataset": data, "model": net, "task": Distance()}
    results = {}
    if what == "whole":
        results["two"] = syncnorm.fit(CONFIG, **own, callbacks=[Points(here)])
        with torch.inference_mode():  # which a run does without
            results["one"] = syncnorm.fit(CONFIG, {"launch.workers": 1}, **own)
    elif what == "stop":
        results["whole"] = syncnorm.fit(CONFIG, **own)
        results["stopped"] = syncnorm.fit(CONFIG, **own, callbacks=[Points(here, stops_after=6)])
        folder = results["stopped"].folder
        results["resumed"] = syncnorm.fit(**own, resume=folder)
    elif what == "interrupt":
        config = {**CONFIG, "train": {**CONFIG["train"], "epochs": 100_000}}
        try:
            syncnorm.fit(config, **own, callbacks=[Interrupting()])
        except KeyboardInterrupt as interrupt:
            print(interrupt, file=sys.stderr)
        assert "SYNCNORM_RUN_FOLDER" not in os.environ
    elif what == "threads":
        # A second thread: workers are not forked, and all that is given is sent to them.
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        results["spawned"] = syncnorm.fit(CONFIG, **own, callbacks=[Points(here)])
        for name, callback in (("failed", Failing()), ("refused", Points(here))):
            if name == "refused":
                callback.lock = threading.Lock()
            try:
                syncnorm.fit(CONFIG, {"launch.workers": 1}, **own, callbacks=[callback])
            except syncnorm.errors.SyncnormError as error:
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
    else:
        results["torchrun"] = syncnorm.fit(CONFIG, **own)
    told = json.dumps({name: asdict(result) for name, result in results.items()}, default=str)
    # With its end in one piece: the workers of torchrun write into one pipe.
    sys.stdout.write(f"{told}\n")


if __name__ == "__main__":
    main(sys.argv[1])
