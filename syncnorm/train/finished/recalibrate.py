"""Recalibration of a run: population statistics of its training set in place of running ones."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from syncnorm import recalibrate
from syncnorm.errors import ConfigError
from syncnorm.model.modes import put_in_evaluation
from syncnorm.train import files
from syncnorm.train.checkpoint.evaluated import (
    NEWEST,
    RECALIBRATED,
    evaluated_unsaved,
    share_evaluated,
)
from syncnorm.train.checkpoint.store import CheckpointStore
from syncnorm.train.config.schema import Config
from syncnorm.train.data.batches import ReadFailure
from syncnorm.train.data.feed import TRAIN, Feed, judged_split
from syncnorm.train.finished.load import make_evaluated, signature_of
from syncnorm.train.renewal import Judged
from syncnorm.train.setup import autocast, load_feed, task_of
from syncnorm.train.step import evaluate
from syncnorm.train.workers import Workers


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


def recalibrate_run(
    folder: Path, config: Config, workers: Workers, mix: float, allowed: tuple[str, ...]
) -> Recalibrated:
    """Recalibrate the evaluated model on the training set, and write a new checkpoint.

    Each worker has its share of the batches. Of a run with a moving average it is the average that
    is recalibrated.

    *Collectives*: those of `syncnorm.recalibrate` and of two evaluations; every worker must call.
    """
    snapshot = share_evaluated(folder, NEWEST, workers)
    with closing(load_feed(config, workers.device, allowed)) as feed:
        split = split_to_compare_by(feed)
        task = task_of(config, workers.device, feed, allowed)
        signature = signature_of(snapshot, folder)
        model = make_evaluated(config, signature, snapshot, folder, workers.device, allowed)
        put_in_evaluation(model, snapshot.facts["in_evaluation"])
        before = evaluate(task, model, feed, split, config, workers)
        with autocast(config, workers.device):
            recalibrate(Judged(model, task), share_of_batches(feed, workers, config), mix=mix)
        after = evaluate(task, model, feed, split, config, workers)
        store = CheckpointStore(folder / RECALIBRATED, keep=1)
        path = Path()
        if workers.is_first:
            unsaved = evaluated_unsaved(snapshot)
            states = snapshot.states | ({"buffers": {"model": unsaved}} if unsaved else {})
            path = store.write(
                replace(snapshot, tensors={"model": model.state_dict()}, states=states)
            )
            # Also of a later step, whose checkpoint is gone or damaged: `--checkpoint recalibrated`
            # would take it for the newest.
            for other in store.folders().values():
                if other != path:
                    files.remove(other)
        return Recalibrated(split, before, after, path)


def split_to_compare_by(feed: Feed) -> str:
    """The split that two networks are compared by.

    Raises:
        ConfigError: there is none.
    """
    split = judged_split(feed)
    if split is None:
        raise ConfigError("`data.name` must have a test set or a validation set to compare by")
    return split


def share_of_batches(feed: Feed, workers: Workers, config: Config) -> Iterator[tuple[Any]]:
    """This worker's share of the batches; sharing them out otherwise changes rounding alone."""
    indices = torch.arange(feed.sizes[TRAIN], device=feed.index_device)
    mine = indices.split(config.train.global_batch)[workers.rank :: workers.world_size]
    for batch in feed.batches(TRAIN, mine):
        if isinstance(batch, ReadFailure):
            raise ConfigError(batch.message)  # `recalibrate` tells the other workers
        yield (batch,)
