"""Time that the trainer adds to a step, against a plain loop under DDP written by hand.

    python -m benchmarks.trainer_step [rounds]

Both have the same network with SyncBatchNorm, 2 gloo workers with one thread each, and take turns;
the ratio is taken within a round. The trainer's step standardises its images, agrees on stops and
finite losses, writes its metrics and, every 50 steps, each layer's figures; the plain loop has its
images ready and writes nothing. In the last case both read the same data set through a DataLoader
with one process for each worker.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from benchmarks import paired
from syncnorm import SyncBatchNorm, prepare_ddp
from syncnorm.train.checkpoint.capture import Progress
from syncnorm.train.config.file import load_config
from syncnorm.train.config.schema import Config
from syncnorm.train.data.builtin import digits
from syncnorm.train.data.datasets import Dataset, Split, make_dataset
from syncnorm.train.data.feed import TRAIN, Feed, LoaderFeed, MemoryFeed
from syncnorm.train.data.inputs import Standardise
from syncnorm.train.data.splits import Splits
from syncnorm.train.loop import Run, take_step
from syncnorm.train.models import MODELS
from syncnorm.train.recorder import Recorder
from syncnorm.train.setup import make_bare_model, make_setup, task_of
from syncnorm.train.workers import Workers

WORKERS = 2
RESNET = ["model.name=resnet18_imagenet", "train.global_batch=64"]
CASES = {
    "digits, 64 images of 8x8 per step": ["train.global_batch=64"],
    "ResNet-18, 64 images of 64x64 per step": RESNET,
    "ResNet-18, the same through a DataLoader": [*RESNET, "data.loader.workers=1"],
}


class Quiet:
    """A watch that wants nothing."""

    stop = None

    def alive(self) -> None:
        pass


def random_images() -> Dataset:
    images = torch.randint(
        0, 256, (256, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    split = Split(images, torch.arange(256) % 10)
    return make_dataset(split, split, 10)


class Shaken(torch.utils.data.Dataset):
    """Images one by one, mirrored at random."""

    def __init__(self, data: Dataset) -> None:
        self.images = Standardise(data.inputs, torch.float32)(data.train.images)
        self.labels = data.train.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        return image.flip(-1) if torch.rand(()) < 0.5 else image.clone(), self.labels[index]


def feed_of(config: Config, data: Dataset, workers: Workers) -> Feed:
    if not config.data.loader.workers:
        return MemoryFeed(data, config, workers.device)
    shaken = Shaken(data)
    return LoaderFeed(Splits(shaken, shaken, None, 10, 3), config, workers.device)


def trainer_step(
    config: Config, data: Dataset, workers: Workers, folder: Path
) -> Callable[[], None]:
    feed = feed_of(config, data, workers)
    task = task_of(config, workers.device, feed)
    model = make_bare_model(config, workers.device, feed, 10**6)
    setup = make_setup(config, workers, feed, 10**6, model, task)
    progress = Progress(epoch=1)
    recorder = Recorder(setup, folder, progress, total_steps=10**6)
    run = Run(
        config, workers, feed, setup, progress, Quiet(), recorder, None, steps_per_epoch=10**6
    )
    steps = torch.arange(len(data.train)).split(config.train.global_batch)[:-1]
    forwards = (f for indices in itertools.cycle(steps) for f in setup.forwards(indices))
    batches = feed.batches(TRAIN, forwards, 1)

    def step() -> None:
        take_step(run, batches, steps[progress.step % len(steps)])

    return step


def plain_step(config: Config, data: Dataset, workers: Workers) -> Callable[[], None]:
    torch.manual_seed(config.train.seed)
    channels = data.train.images.shape[1]
    model = MODELS[config.model.name](
        in_channels=channels, num_classes=10, norm_layer=SyncBatchNorm
    )
    wrapped = DistributedDataParallel(prepare_ddp(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10**6)
    batches = plain_batches(config, data, workers)

    def step() -> None:
        images, labels = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(wrapped(images), labels).backward()
        optimizer.step()
        schedule.step()

    return step


def plain_batches(
    config: Config, data: Dataset, workers: Workers
) -> Iterator[tuple[Tensor, Tensor]]:
    size = config.train.global_batch // workers.world_size
    steps = torch.arange(len(data.train)).split(config.train.global_batch)[:-1]
    mine = itertools.cycle([indices[workers.rank * size :][:size] for indices in steps])
    if config.data.loader.workers:
        sampler: Any = (indices.tolist() for indices in mine)
        return iter(DataLoader(Shaken(data), batch_sampler=sampler, num_workers=1))
    images = Standardise(data.inputs, torch.float32)(data.train.images)
    return ((images[indices], data.train.labels[indices]) for indices in mine)


def _worker(rank: int, folder: str, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", (Path(folder) / "rendezvous").as_uri(), rank=rank, world_size=WORKERS
    )
    workers = Workers(rank, WORKERS, torch.device("cpu"), WORKERS)
    for number, (name, options) in enumerate(CASES.items()):
        config = load_config("digits", [*options, "train.schedule.warmup=0", "train.decay=all"])
        data = digits(None) if number == 0 else random_images()
        candidates = {
            "plain": plain_step(config, data, workers),
            "trainer": trainer_step(config, data, workers, Path(folder)),
        }
        seconds = paired.rounds(candidates, rounds * (10 if number == 0 else 1), warm_up=10)
        if rank == 0:
            median = 1e3 * sorted(seconds["plain"])[len(seconds["plain"]) // 2]
            # The mean too: figures of the layers come once in 50 steps, which a median does not
            # see.
            mean = sum(seconds["trainer"]) / sum(seconds["plain"])
            ratio = paired.ratio(seconds["trainer"], seconds["plain"])
            print(f"| {name} | {ratio} | {mean:.3f} | {median:.1f} |", flush=True)
    dist.destroy_process_group()


def main() -> None:
    paired.fix_allocator()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 61
    print(
        f"{WORKERS} workers, one thread each, {rounds} rounds (digits: 10 times as many); torch "
        f"{torch.__version__}"
    )
    print(
        "| step | trainer / plain, median [95 % interval] | ratio of the means | plain, median ms |"
    )
    print("|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        # Not daemons: they have processes that load.
        mp.spawn(_worker, (folder, rounds), nprocs=WORKERS, daemon=False)


if __name__ == "__main__":
    main()
