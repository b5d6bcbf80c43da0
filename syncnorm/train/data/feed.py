"""The batches of a run: from images in memory, or through torch's DataLoader."""

import os
import signal
import threading
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from syncnorm.errors import ConfigError
from syncnorm.system import block, die_with_parent, is_linux
from syncnorm.train.config.schema import Config
from syncnorm.train.data import datasets
from syncnorm.train.data.augment import augment
from syncnorm.train.data.augmented import Augmented
from syncnorm.train.data.batches import Collate, ReadFailure, empty_like, to_device
from syncnorm.train.data.classes import classes_of
from syncnorm.train.data.inputs import Inputs, Signature, Standardise
from syncnorm.train.data.mixing import mix, partners
from syncnorm.train.data.seeded import Key, Seeded
from syncnorm.train.data.splits import Splits

TRAIN, VALIDATION, TEST = "train", "validation", "test"
_Use = tuple[str, bool]


class Feed(Protocol):
    """The source of this worker's batches.

    Attributes:
        sizes: samples of each of `train`, `validation` and `test` that there is.
        index_device: of the tensors of indices that it takes.
        signature: the inputs and outputs of a model for it.
        labels: (N,), int64, on the CPU, of the training set; None if they are not known before
            samples are read.
    """

    sizes: dict[str, int]
    index_device: torch.device
    signature: Signature
    labels: Tensor | None

    def batches(self, split: str, forwards: Iterable[Tensor], epoch: int = 0) -> Iterator[Any]:
        """Yield the batch of each forward, on the worker's device, or a `ReadFailure`.

        Only one iteration over a split, in an epoch or without, may be under way.

        Args:
            split: `train`, `validation` or `test`.
            forwards: of each, the samples' indices (n,), perhaps none.
            epoch: random changes to samples are drawn for it; 0: it is an evaluation.
        """
        ...

    def load(self, split: str, indices: Tensor, epoch: int = 0) -> Any:
        """Load one batch.

        Raises:
            ConfigError: a sample cannot be read.
        """
        ...

    def load_each(self, split: str, forwards: Sequence[Tensor], epoch: int = 0) -> list[Any]:
        """Load batches one after the other, in one process. Raises as `load`."""
        ...

    def describe(self) -> str:
        """Describe the data in a few words."""
        ...

    def close(self) -> None:
        """End what loads ahead. The feed can be used no more."""
        ...


def judged_split(feed: Feed) -> str | None:
    """Name the split that is evaluated while a run goes on, if there is one."""
    return next((name for name in (VALIDATION, TEST) if feed.sizes.get(name)), None)


def labels_checksum(feed: Feed) -> int | None:
    """Compute a checksum of the training set's labels; None if they are not known."""
    return None if feed.labels is None else zlib.crc32(feed.labels.cpu().numpy().tobytes())


class MemoryFeed:
    """Images in memory, gathered, standardised and augmented on the worker's device."""

    sizes: dict[str, int]
    signature: Signature

    def __init__(self, data: datasets.Dataset, config: Config, device: torch.device) -> None:
        self._data = data.to(device)
        self._config = config
        self.index_device = device
        self.sizes = {name: len(split) for name, split in self._splits().items()}
        self.labels: Tensor | None = data.train.labels.cpu()
        inputs, channels = data.inputs, data.train.images.shape[1]
        self.signature = _signature(inputs, channels, data.num_classes, data.classes)
        self._standardise = self._standardise_by(inputs)

    def standardise_as(self, inputs: Inputs) -> None:
        """Standardise by the figures of another run's inputs."""
        figures = {"mean": inputs.mean, "std": inputs.std}
        self._standardise = self._standardise_by(self._data.inputs.model_copy(update=figures))

    def _standardise_by(self, inputs: Inputs) -> Standardise:
        return Standardise(inputs, getattr(torch, self._config.train.dtype)).to(self.index_device)

    def _splits(self) -> dict[str, datasets.Split]:
        data = self._data
        some = {TRAIN: data.train, VALIDATION: data.validation, TEST: data.test}
        return {name: split for name, split in some.items() if split is not None}

    def batches(self, split: str, forwards: Iterable[Tensor], epoch: int = 0) -> Iterator[Any]:
        """Yield the images (n, C, H, W) and labels (n,) of each forward."""
        return (self.load(split, indices, epoch) for indices in forwards)

    def load(self, split: str, indices: Tensor, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Gather images (n, C, H, W), standardised and, in an epoch, augmented; and labels (n,).

        Mixed ones have class probabilities (n, K) in place of labels.
        """
        if split != TRAIN or not epoch:
            part = self._splits()[split][indices]
            return self._standardise(part.images), part.labels
        options, seed = self._config.data.augment, self._config.train.seed
        images, labels = self._augmented(indices, epoch)
        if not (options.mixup or options.cutmix):
            return images, labels
        others = partners(indices, self.sizes[TRAIN], seed, epoch)
        other_images, other_labels = self._augmented(others, epoch)
        samples = images, self._probabilities(labels)
        other_samples = other_images, self._probabilities(other_labels)
        return mix(samples, other_samples, indices, options, seed, epoch)

    def load_each(self, split: str, forwards: Sequence[Tensor], epoch: int = 0) -> list[Any]:
        """Gather batches one after the other."""
        return [self.load(split, indices, epoch) for indices in forwards]

    def _augmented(self, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        part, config = self._data.train[indices], self._config
        images = self._standardise(part.images)
        changed = augment(images, indices, config.data.augment, config.train.seed, epoch)
        return changed, part.labels

    def _probabilities(self, labels: Tensor) -> Tensor:
        dtype = getattr(torch, self._config.train.dtype)
        return F.one_hot(labels, self._data.num_classes).to(dtype)

    def describe(self) -> str:
        """Describe the data in a few words."""
        shape = "x".join(map(str, self._data.train.images.shape[1:]))
        return f"{describe_sizes(self.sizes)} images of {shape}"

    def close(self) -> None:
        """Do nothing: nothing loads ahead."""


class LoaderFeed:
    """Any map-style data sets, through torch's DataLoader.

    Args:
        splits: the data sets.
        config: of the run.
        device: of the batches.
    """

    sizes: dict[str, int]
    index_device: torch.device
    signature: Signature

    def __init__(self, splits: Splits, config: Config, device: torch.device) -> None:
        self._config, self._device = config, device
        self._dtype = getattr(torch, config.train.dtype)
        seed = config.train.seed
        # Of samples that a collate of the user's changes, the task gets other targets.
        is_plain = splits.collate is None
        classes = classes_of(config.task, splits.num_classes) if is_plain else None
        train: Dataset[Any] = Seeded(splits.train, seed, TRAIN, classes)
        if config.data.augment.changes_something:
            train = Augmented(train, config.data.augment, seed, splits.num_classes)
        unchanged = splits.train if splits.unchanged is None else splits.unchanged
        judged = {TRAIN: unchanged, VALIDATION: splits.validation, TEST: splits.test}
        # By split, and whether it is read in an epoch of training.
        self._sets: dict[_Use, Any] = {(TRAIN, True): train} | {
            (name, False): Seeded(data, seed, name, classes)
            for name, data in judged.items()
            if data is not None
        }
        self._collate = Collate(splits.collate)
        self._loaders: dict[_Use, tuple[DataLoader[Any], _Plan]] = {}
        self._readings: dict[_Use, Generator[Any]] = {}
        """The iterations under way."""
        self.sizes = {
            name: len(data) for (name, in_epoch), data in self._sets.items() if not in_epoch
        }
        self.index_device = torch.device("cpu")
        self.labels: Tensor | None = splits.known_labels()
        self._nothing: Any = None
        self._nothing = empty_like(self.load(TRAIN, torch.zeros(1, dtype=torch.int64)))
        inputs = splits.inputs or _as_prepared(self._nothing)
        self.signature = _signature(inputs, splits.in_channels, splits.num_classes, splits.classes)

    def batches(self, split: str, forwards: Iterable[Tensor], epoch: int = 0) -> Iterator[Any]:
        """Iterate over the batch of each forward; loader processes work ahead."""
        use = split, split == TRAIN and epoch > 0
        if use not in self._loaders:
            # The training set is seldom judged.
            workers = self._config.data.loader.workers
            self._loaders[use] = self._make_loader(use, workers, stays=use != (TRAIN, False))
        self._readings[use] = self._read(*self._loaders[use], forwards, epoch)
        return self._readings[use]

    def load(self, split: str, indices: Tensor, epoch: int = 0) -> Any:
        """Load one batch, where batches are loaded."""
        return self.load_each(split, [indices], epoch)[0]

    def load_each(self, split: str, forwards: Sequence[Tensor], epoch: int = 0) -> list[Any]:
        """Load batches one after the other, in one process, where batches are loaded.

        A data set that opens a file when it is first read must not do so before loaders fork: they
        would share the place in it.
        """
        use = split, split == TRAIN and epoch > 0
        workers = min(1, self._config.data.loader.workers)
        loader = self._make_loader(use, workers, stays=False)
        batches = [*islice(self._read(*loader, forwards, epoch), len(forwards))]
        for batch in batches:
            if isinstance(batch, ReadFailure):
                raise ConfigError(batch.message)
        return batches

    def _read(
        self, loader: DataLoader[Any], plan: "_Plan", forwards: Iterable[Tensor], epoch: int
    ) -> Generator[Any]:
        plan.begin(forwards, epoch)
        try:
            for batch in _begin(loader):
                yield self._finish(batch, plan.sizes.pop(0))
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            failure = ReadFailure(
                f"`data.loader.workers` must be processes that live, got: {error}. Set "
                "data.loader.workers=0 to load in the worker itself, and see its error.",
                self._nothing,
            )
            while True:  # a step may have several forwards
                yield failure

    def describe(self) -> str:
        """Describe the data in a few words."""
        return f"{describe_sizes(self.sizes)} samples"

    def close(self) -> None:
        """End the loader processes, of a run that failed too.

        torch's loaders end theirs as the last reference goes. A collector of garbage that finds one
        in a cycle, such as an error and its frames, waits for seconds, and leaves the processes.
        """
        for reading in self._readings.values():
            reading.close()
        self._readings.clear()
        self._loaders.clear()

    def _finish(self, batch: Any, size: int) -> Any:
        if isinstance(batch, ReadFailure):
            return replace(batch, instead=self._nothing)
        return to_device(batch if size else empty_like(batch), self._device, self._dtype)

    def _make_loader(
        self, use: "_Use", workers: int, *, stays: bool
    ) -> "tuple[DataLoader[Any], _Plan]":
        section, plan = self._config.data.loader, _Plan()
        dataset: Dataset[Any] = self._sets[use]
        several: dict[str, Any] = {}
        if workers:
            several = {
                "num_workers": workers,
                "prefetch_factor": section.prefetch,
                "persistent_workers": stays,
                "worker_init_fn": partial(_begin_loading, os.getpid()),
                # Nothing is imported again, and a data set need not be pickled.
                "multiprocessing_context": "fork" if is_linux() else None,
            }
        loader = DataLoader(
            dataset,
            batch_sampler=plan,
            collate_fn=self._collate,
            pin_memory=self._device.type == "cuda",
            # Otherwise each iteration would draw a number from the training's own random numbers.
            generator=torch.Generator(),
            **several,
        )
        return loader, plan


def _as_prepared(batch: Any) -> Inputs | None:
    """Describe the inputs that a data set prepares, by a batch of them; None for no single tensor."""
    inputs = batch[0] if isinstance(batch, list | tuple) and len(batch) == 2 else None
    if not isinstance(inputs, Tensor) or inputs.ndim < 1:
        return None
    return Inputs(shape=tuple(inputs.shape[1:]), dtype=_name(inputs.dtype))


def _signature(
    inputs: Inputs | None,
    in_channels: int | None,
    num_classes: int | None,
    classes: Sequence[str] | None,
) -> Signature:
    return Signature(
        inputs=inputs,
        in_channels=in_channels,
        num_classes=num_classes,
        classes=None if classes is None else tuple(map(str, classes)),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Plan:
    """The batch sampler of a loader: the forwards that it is given.

    Args of `begin` are those of `Feed.batches`. A forward of no samples loads the first one, so
    that there is a batch to empty.
    """

    def __init__(self) -> None:
        self._forwards: Iterable[Tensor] = ()
        self._epoch = 0
        self.sizes: list[int] = []
        """Numbers of samples of the batches that are on their way."""

    def begin(self, forwards: Iterable[Tensor], epoch: int) -> None:
        self._forwards, self._epoch, self.sizes = forwards, epoch, []

    def __iter__(self) -> Iterator[list[Key]]:
        for indices in self._forwards:
            self.sizes.append(len(indices))
            yield _keys(indices, self._epoch)


def _keys(indices: Tensor, epoch: int) -> list[Key]:
    return [(index, epoch) for index in indices.tolist() or [0]]


def _begin(loader: DataLoader[Any]) -> Iterator[Any]:
    """Begin an iteration, without torch's handler of dead loaders.

    It would raise wherever the worker is, in the midst of an exchange say. Without it the iteration
    itself finds out, within seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    signal.signal(signal.SIGCHLD, before)
    return iterator


def _begin_loading(trainer: int, worker: int) -> None:
    """Live as long as the worker does, whoever asks all processes to stop: it finishes its step.

    Args:
        trainer: the worker's process, which may be dead already.
        worker: the number of this process among those that load.
    """
    die_with_parent(trainer)
    block([signal.SIGTERM, signal.SIGINT])


def describe_sizes(sizes: Mapping[str, int]) -> str:
    """Write the numbers of samples, such as `90 training, 10 test`."""
    names = {TRAIN: "training", VALIDATION: "validation", TEST: "test"}
    *some, last = [f"{size} {names[name]}" for name, size in sizes.items()]
    return f"{', '.join(some)} and {last}" if some else last
