"""Deaths of a run's first worker inside a save, for `drills.kill_drill`.

The runs have `net` for a model, which calls `arm` in each worker, and the plan of their deaths in
their environment. The package knows nothing of either.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from syncnorm.train import files
from syncnorm.train.checkpoint.snapshot import Snapshot
from syncnorm.train.checkpoint.store import CheckpointStore
from syncnorm.train.data.builtin import digits
from syncnorm.train.data.datasets import Split
from syncnorm.train.data.splits import Splits
from syncnorm.train.models import MODELS

PLAN = "SYNCNORM_DRILL_PLAN"

_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
_WRITES = os.O_WRONLY | os.O_RDWR


class Torn(NamedTuple):
    """A death inside a save.

    Args:
        step: of the save, or of the next one if that one is left out.
        after: how many bytes are written, or how many operations on the file system are done,
            before it; where the save has fewer, the worker dies when the save is done, before
            anybody knows.
        is_bytes: what is counted.
    """

    step: int
    after: int
    is_bytes: bool


def write_plan(path: Path, torn: list[Torn]) -> None:
    """Write down the deaths to come, one for each life of the first worker."""
    path.write_text(json.dumps(torn), encoding="utf-8")
    _record_of(path).touch()


def read_deaths(path: Path) -> list[dict[str, Any]]:
    """Return the deaths of a plan that have come: `place`, and `time` in seconds since 1970."""
    return [json.loads(line) for line in _record_of(path).read_text(encoding="utf-8").splitlines()]


def net(**kwargs: Any) -> nn.Module:
    """Build the network of `digits`, in a worker that will die by the plan."""
    arm()
    return MODELS["digits_resnet"](**kwargs)


class DigitSamples(Dataset[Any]):
    """The digits one by one, moved by a pixel at random."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self._split.images[index].float() / 16  # (1, 8, 8)
        down, right = torch.randint(-1, 2, (2,)).tolist()
        return image.roll((down, right), (1, 2)), self._split.labels[index]


def digit_samples(root: Path | None) -> Splits:
    """Give the digits as any data set."""
    data = digits(root)
    return Splits(DigitSamples(data.train), DigitSamples(data.test), num_classes=10, in_channels=1)


def arm() -> None:
    """Let this process die by the plan's next death, if it is the first worker."""
    if os.environ.get("RANK") != "0":
        return
    path = Path(os.environ[PLAN])
    plan = [Torn(*torn) for torn in json.loads(path.read_text(encoding="utf-8"))]
    done = len(read_deaths(path))
    if done < len(plan):
        _install(plan[done], _record_of(path))


def _record_of(path: Path) -> Path:
    return path.with_suffix(".deaths")


def _install(torn: Torn, record: Path) -> None:
    death = _Death(torn, record)
    write = CheckpointStore.write

    def write_and_die(self: CheckpointStore, snapshot: Snapshot, *, is_best: bool = False) -> Path:
        if snapshot.step < torn.step:
            return write(self, snapshot, is_best=is_best)
        with death.near():
            path = write(self, snapshot, is_best=is_best)
            death.strike("after the rename")
        return path

    CheckpointStore.write = write_and_die
    if torn.is_bytes:
        files.open_to_write = lambda path: io.BufferedWriter(_DyingFile(path, death))
    else:
        sys.addaudithook(death.before_operation)


class _Death:
    """Counts down while its save is under way, in the thread that writes it."""

    def __init__(self, torn: Torn, record: Path) -> None:
        self.left = torn.after
        self._record = record
        self._thread: int | None = None
        self._is_renamed = False

    @contextmanager
    def near(self) -> Iterator[None]:
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None

    @property
    def is_near(self) -> bool:
        return self._thread == threading.get_ident()

    def strike(self, place: str) -> None:
        self._thread = None
        with self._record.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "place": place}) + "\n")
        os.kill(os.getpid(), signal.SIGKILL)

    def before_operation(self, event: str, arguments: tuple[Any, ...]) -> None:
        if (
            not self.is_near
            or event not in _OPERATIONS
            or (event == "open" and not arguments[2] & _WRITES)
        ):
            return
        place = self._place(event, Path(str(arguments[0])).name)
        if self.left == 0:
            self.strike(place)
        self.left -= 1
        self._is_renamed |= place == "before the rename"

    def _place(self, event: str, name: str) -> str:
        if self._is_renamed:
            return "after the rename"
        if event == "os.rename" and name.startswith(".tmp-step-"):
            return "before the rename"
        return "before the manifest" if name == "manifest.json" else "between files"


class _DyingFile(io.FileIO):
    """Writes what is left to write, in full or in part."""

    def __init__(self, path: Path, death: _Death) -> None:
        super().__init__(path, "wb")
        self._death = death

    def write(self, data: Any, /) -> int:
        view, death = memoryview(data).cast("B"), self._death
        if death.is_near:
            if len(view) > death.left:
                super().write(view[: death.left])
                death.strike("inside a file")
            death.left -= len(view)
        return super().write(view)
