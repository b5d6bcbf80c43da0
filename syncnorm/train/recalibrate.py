"""Recalibration of a run: population statistics of its training set in place of running ones."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from syncnorm import recalibrate
from syncnorm.errors import CheckpointError, ConfigError
from syncnorm.model.modes import in_evaluation, put_in_evaluation
from syncnorm.train import buffers
from syncnorm.train.checkpoint.evaluated import evaluated_state, evaluated_unsaved
from syncnorm.train.checkpoint.snapshot import Snapshot
from syncnorm.train.checkpoint.store import CHECKPOINTS, CheckpointStore
from syncnorm.train.config.callables import check_callables
from syncnorm.train.config.file import load_config
from syncnorm.train.config.schema import Config
from syncnorm.train.data.batches import Failure
from syncnorm.train.data.feed import TRAIN, Feed, judged_split
from syncnorm.train.placement import Workers
from syncnorm.train.renewal import Judged
from syncnorm.train.setup import autocast, load_feed, make_model, task_of
from syncnorm.train.step import evaluate

RECALIBRATED = "recalibrated"


@dataclass(frozen=True)
class Recalibrated:
    """Metrics by the old and by the new statistics, and the new checkpoint.

    Args:
        split: that they are of.
        before: by name; the one that decides comes first.
        after: as above.
        path: of the checkpoint.
    """

    split: str
    before: dict[str, float]
    after: dict[str, float]
    path: Path


def read_run(folder: Path, allowed: tuple[str, ...] = ()) -> Config:
    """Read the configuration of a run.

    Args:
        folder: of the run.
        allowed: packages whose callables it may name. Those that the run itself was allowed do not
            count: the folder may be somebody else's.

    Raises:
        ConfigError: it is not a run's folder, or its configuration names code that is not allowed.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"run {str(folder)!r} has no config.yaml. Name the folder of a run.")
    config = load_config(str(folder / "config.yaml"))
    check_callables(config, allowed)
    return config


def recalibrate_run(
    folder: Path, config: Config, workers: Workers, mix: float, allowed: tuple[str, ...] = ()
) -> Recalibrated:
    """Recalibrate the evaluated model on the training set, and write a new checkpoint.

    Each worker has its share of the batches. Of a run with a moving average it is the average that
    is recalibrated.

    *Collectives*: those of `syncnorm.recalibrate` and of two evaluations; every worker must call.
    """
    snapshot = _newest(folder, workers)
    feed = load_feed(config, workers.device, allowed)
    split = judged_split(feed)
    if split is None:
        raise ConfigError("`data.name` must have a test set or a validation set to compare by")
    task = task_of(config, workers.device, feed, allowed)
    model = make_model(config, workers.device, feed, 1, allowed)
    try:
        unsaved = evaluated_unsaved(snapshot)
        buffers.load(model, evaluated_state(snapshot), unsaved)
        put_in_evaluation(model, snapshot.facts.get("in_evaluation", in_evaluation(model)))
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{folder / CHECKPOINTS}: does not fit the run's configuration: {reason}"
        ) from None
    before = evaluate(task, model, feed, split, config, workers)
    with autocast(config, workers.device):
        recalibrate(Judged(model, task), _batches(feed, workers, config), mix=mix)
    after = evaluate(task, model, feed, split, config, workers)
    store = CheckpointStore(folder / RECALIBRATED, keep=1)
    path = Path()
    if workers.is_first:
        states = snapshot.states | ({"buffers": {"model": unsaved}} if unsaved else {})
        path = store.write(replace(snapshot, tensors={"model": model.state_dict()}, states=states))
    return Recalibrated(split, before, after, path)


def _newest(folder: Path, workers: Workers) -> Snapshot:
    """Read the newest good checkpoint on the first worker, and send it to all."""
    found: list[Snapshot | ConfigError | None] = [None]
    if workers.is_first:
        found = [_read(folder)]
    dist.broadcast_object_list(found, src=0)
    (snapshot,) = found
    if isinstance(snapshot, ConfigError):
        raise snapshot
    assert snapshot is not None
    return snapshot


def _read(folder: Path) -> Snapshot | ConfigError:
    if not (folder / CHECKPOINTS).is_dir():
        return ConfigError(
            f"run {str(folder)!r} has no {CHECKPOINTS}. "
            "Name the folder of a run that has saved one."
        )
    try:
        snapshot, _, faults = CheckpointStore(folder / CHECKPOINTS).newest()
    except (OSError, CheckpointError) as error:
        return ConfigError(f"{folder / CHECKPOINTS}: {error}")
    if snapshot is None:
        return ConfigError(faults[0] if faults else f"{folder / CHECKPOINTS}: holds no checkpoint")
    return snapshot


def _batches(feed: Feed, workers: Workers, config: Config) -> Iterator[tuple[Any]]:
    """This worker's share of the batches; sharing them out otherwise changes rounding alone."""
    indices = torch.arange(feed.sizes[TRAIN], device=feed.index_device)
    mine = indices.split(config.train.global_batch)[workers.rank :: workers.world_size]
    for batch in feed.batches(TRAIN, mine):
        if isinstance(batch, Failure):
            raise ConfigError(batch.message)  # `recalibrate` tells the other workers
        yield (batch,)
