"""The evaluation of a run's model on one of its sets, or on other data."""

import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from syncnorm.errors import ConfigError
from syncnorm.model.mixed import Choice
from syncnorm.system import tell
from syncnorm.train.checkpoint.evaluated import share_evaluated
from syncnorm.train.config.schema import Config
from syncnorm.train.data.feed import TEST, Feed, MemoryFeed, judged_split
from syncnorm.train.data.inputs import Inputs, Signature
from syncnorm.train.finished.load import make_evaluated, signature_of
from syncnorm.train.setup import load_feed, task_of
from syncnorm.train.step import evaluate
from syncnorm.train.waiting import from_first
from syncnorm.train.workers import Workers

# Sources that take the figures to standardise by as options, in the units of their samples.
_TAKE_FIGURES = ("npz", "npy")
# Of standardised samples a channel has a mean near 0 and a deviation near 1. These are of others.
_FAR, _FLAT = 5.0, 0.1
_LOOKED_AT = 64


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a run's model.

    Args:
        split: that they are of.
        samples: of the split.
        metrics: by name; the one that decides comes first.
        step: of the checkpoint.
    """

    split: str
    samples: int
    metrics: dict[str, float]
    step: int


def evaluate_run(
    folder: Path,
    config: Config,
    workers: Workers,
    split: str | None,
    checkpoint: str,
    allowed: tuple[str, ...],
    *,
    has_other_data: bool,
    statistics: Choice,
) -> Evaluation:
    """Evaluate the model of a run, each worker on its shard.

    The result is that of the run's own evaluation: the same samples are counted, on any number of
    workers. With other statistics it is that of batches as large as a step's.

    *Collectives*: broadcasts of the checkpoint and of other data's faults, and those of `evaluate`;
    every worker must call.

    Args:
        folder: of the run.
        config: of the run, perhaps with other data.
        workers: this worker's rank and device.
        split: its name; None: the test set, or else the validation set.
        checkpoint: its name.
        allowed: packages whose callables the configuration may name.
        has_other_data: True if keys of `data` are not the run's: samples are standardised by the
            run's figures all the same.
        statistics: what batch norms normalise by.

    Raises:
        ConfigError: bad input; on all workers.
    """
    snapshot = share_evaluated(folder, checkpoint, workers)
    signature = signature_of(snapshot, folder)
    if has_other_data:
        config = _with_figures(config, signature.inputs)
    with closing(load_feed(config, workers.device, allowed)) as feed:
        if has_other_data:
            _fit(feed, signature)
        chosen = split or (TEST if feed.sizes.get(TEST) else judged_split(feed))
        if chosen is None or not feed.sizes.get(chosen):
            raise ConfigError(
                f"`--split` must be one of {', '.join(feed.sizes)}, which the data has, got "
                f"{chosen or 'none'}"
            )
        if has_other_data:
            from_first(workers.is_first, lambda: _warn_of_units(feed, chosen, signature.inputs))
        task = task_of(config, workers.device, feed, allowed)
        model = make_evaluated(config, signature, snapshot, folder, workers.device, allowed)
        metrics = evaluate(task, model, feed, chosen, config, workers, statistics=statistics)
        return Evaluation(chosen, feed.sizes[chosen], metrics, snapshot.step)


def _with_figures(config: Config, inputs: Inputs | None) -> Config:
    if inputs is None or inputs.mean is None or config.data.name not in _TAKE_FIGURES:
        return config
    figures = {"mean": list(inputs.mean), "std": list(inputs.std or ())}
    data = config.data.model_copy(update={"options": {**config.data.options, **figures}})
    return config.model_copy(update={"data": data})


def _fit(feed: Feed, signature: Signature) -> None:
    """Let a feed of other data standardise as the run does, and refuse other inputs and classes.

    Raises:
        ConfigError: they differ.
    """
    found, wanted = feed.signature, signature
    if found.classes != wanted.classes and found.classes and wanted.classes:
        raise ConfigError(
            f"`--data` must have the run's classes {', '.join(wanted.classes):.200}, got "
            f"{', '.join(found.classes):.200}"
        )
    if (found.num_classes or 0) > (wanted.num_classes or math.inf):
        raise ConfigError(
            f"`--data` must have the run's {wanted.num_classes} classes, got {found.num_classes}"
        )
    if found.inputs is None or wanted.inputs is None:
        return
    if found.inputs.shape != wanted.inputs.shape:
        raise ConfigError(
            f"`--data` must have samples of shape {wanted.inputs.shape}, got {found.inputs.shape}"
        )
    if isinstance(feed, MemoryFeed) and wanted.inputs.mean is not None:
        feed.standardise_as(wanted.inputs)
    elif (found.inputs.mean, found.inputs.std) != (wanted.inputs.mean, wanted.inputs.std):
        raise ConfigError(
            "`--data` must be standardised by the run's mean and std, got those of another "
            "training set. Keep the run's training set beside the other samples."
        )


def _warn_of_units(feed: Feed, split: str, inputs: Inputs | None) -> None:
    """Say so where other data seem to be on another scale than the run's, such as [0, 1] for bytes."""
    if inputs is None or inputs.mean is None:
        return
    size = feed.sizes[split]
    # All over the split, which may be sorted.
    spread = torch.arange(0, size, max(1, size // _LOOKED_AT), device=feed.index_device)
    batch = feed.load(split, spread[:_LOOKED_AT])
    samples = batch[0] if isinstance(batch, tuple | list) and batch else None
    if not isinstance(samples, Tensor) or samples.ndim < 2:
        return
    std, mean = torch.std_mean(samples.transpose(0, 1).flatten(1).double(), 1, correction=0)
    if mean.abs().max() > _FAR or std.max() < _FLAT:
        tell(
            "syncnorm: --data: by the run's mean and std its samples have a mean of "
            f"{mean[mean.abs().argmax()]:.2g} and a standard deviation of {std.max():.2g}: are its "
            "numbers on another scale?"
        )
