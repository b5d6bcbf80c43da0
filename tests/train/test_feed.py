"""The batches of a run, through loaders."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from syncnorm.train.config.schema import Config
from syncnorm.train.data import feed
from syncnorm.train.data.batches import ReadFailure
from syncnorm.train.data.feed import TRAIN, VALIDATION, LoaderFeed
from syncnorm.train.data.splits import Splits
from tests.train.test_tasks import sections

COUNT = 400


class Lazy(Dataset[tuple[Tensor, int]]):
    """Numbers of a file that is opened by the first who reads, as those of many formats are."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(b"".join(number.to_bytes(4, "little") for number in range(COUNT)))
        self._path = path
        self._file: Any = None

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self._file is None:
            self._file = self._path.open("rb", buffering=0)
        self._file.seek(4 * index)
        return torch.tensor([float(int.from_bytes(self._file.read(4), "little"))]), os.getpid()


class Stuck(Dataset[tuple[Tensor, int]]):
    """Whoever reads the ninth sample says its process's number into a pipe, and stays there."""

    def __init__(self) -> None:
        self.said, self._say = os.pipe()

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 8:
            os.write(self._say, os.getpid().to_bytes(8, "little"))
            signal.pause()
        return torch.zeros(1), 0


class Shaken(Dataset[Tensor]):
    """Numbers, changed at random or not."""

    def __init__(self, by: float) -> None:
        self._by = by

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Tensor:
        return index + self._by * torch.rand(())


def feed_of(splits: Splits, workers: int) -> LoaderFeed:
    changes = {"data": {"loader": {"workers": workers}}}
    config = Config(**sections("Perceptron", "rows", **changes))
    return LoaderFeed(splits, config, torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_loaders_share_no_file_that_the_worker_has_opened(tmp_path):
    data = Lazy(tmp_path / "numbers")
    feed = feed_of(Splits(data, data), workers=3)
    feed.load(TRAIN, torch.arange(4), 1)
    assert data._file is None, "the worker itself has read nothing"
    order = torch.randperm(COUNT)
    numbers = [batch[0] for batch in feed.batches(TRAIN, order.split(8), 1)]
    assert torch.equal(torch.cat(numbers)[:, 0], order.float())


def test_a_signal_to_all_processes_leaves_the_loaders_to_the_worker(tmp_path):
    data = Lazy(tmp_path / "numbers")
    batches = feed_of(Splits(data, data), workers=1).batches(TRAIN, torch.arange(COUNT).split(4), 1)
    (loader,) = set(next(batches)[1].tolist())
    for each in (signal.SIGTERM, signal.SIGINT):
        os.kill(loader, each)
    assert len([batch for batch in batches if not isinstance(batch, ReadFailure)]) == COUNT // 4 - 1


def test_a_loader_that_is_killed_is_a_failure_of_the_next_batch_and_of_nothing_else():
    """Killed where it reads: elsewhere it may hold a lock of torch's, for which its worker waits."""
    data = Stuck()
    batches = feed_of(Splits(data, data), workers=1).batches(TRAIN, torch.arange(COUNT).split(4), 1)
    next(batches)
    os.kill(int.from_bytes(os.read(data.said, 8), "little"), signal.SIGKILL)
    signal.sigtimedwait([signal.SIGCHLD], 0.5)
    failed = next(batch for batch in batches if isinstance(batch, ReadFailure))
    assert failed.message.startswith("`data.loader.workers` must be processes that live")
    assert len(failed.instead[0]) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_no_training_sees_no_random_changes(workers):
    splits = Splits(Shaken(0.5), unchanged=Shaken(0)).check().hold_out(0.25)
    feed = feed_of(splits, workers)
    for split, epoch, is_changed in ((VALIDATION, 0, False), (TRAIN, 0, False), (TRAIN, 1, True)):
        values = feed.load(split, torch.arange(20), epoch)
        assert torch.equal(values, values.round()) != is_changed
    train, held = splits.train, splits.validation
    assert held is not None
    kept = {int(train[index]) for index in range(len(train))}  # pyright: ignore[reportArgumentType]
    assert len(kept) == 300
    assert kept.isdisjoint({int(held[index]) for index in range(100)})


def test_a_process_that_loads_ends_where_its_worker_is_dead():
    context = multiprocessing.get_context("forkserver")
    for trainer, status in ((os.getpid(), 1), (None, 0)):
        # The parent is the server of forks, not this process.
        loading = context.Process(target=feed._begin_loading, args=(trainer, 0))
        loading.start()
        loading.join()
        assert loading.exitcode == status
