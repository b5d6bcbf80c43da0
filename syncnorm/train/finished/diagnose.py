"""The diagnosis of a run: its model and training batches as a `Problem`, shared out as in training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from syncnorm import prepare_ddp, rng
from syncnorm.diagnose import Forward, Problem, advise, diagnose
from syncnorm.errors import ConfigError, InputError
from syncnorm.family.layer import Pooling
from syncnorm.placement import size
from syncnorm.train.checkpoint.evaluated import share_evaluated
from syncnorm.train.checkpoint.snapshot import Snapshot
from syncnorm.train.config.schema import Config
from syncnorm.train.data.batches import ReadFailure
from syncnorm.train.data.feed import TRAIN, Feed
from syncnorm.train.data.inputs import Signature
from syncnorm.train.data.regimes import training_order
from syncnorm.train.finished.load import make_evaluated, signature_of
from syncnorm.train.finished.parts import Part, Plan, plan_step
from syncnorm.train.parameters import freeze
from syncnorm.train.setup import autocast, load_feed, make_network, task_of
from syncnorm.train.step import raise_read_failure
from syncnorm.train.task import Task
from syncnorm.train.task.losses import loss_terms
from syncnorm.train.weights import load_weights
from syncnorm.train.workers import Workers

_log = logging.getLogger(__name__)

# At the end of a schedule steps of the rate that is left would drown in rounding.
_LEAST_OF_LR = 0.01


@dataclass(frozen=True)
class RunDiagnosis:
    """What was measured of a run: what `diagnosis.json` holds.

    Args:
        run: its name.
        step: of the checkpoint.
        workers: of the training; the parts of a batch are theirs.
        batches: that were looked at.
        samples: of a batch.
        lr: the unit of steps along the gradient.
        measures: see `syncnorm.diagnose`.
        advice: rule and text of each sentence.
        seconds: by measure.
    """

    run: str
    step: int
    workers: int
    batches: int
    samples: int
    lr: float
    measures: dict[str, dict[str, Any]]
    advice: list[dict[str, str]]
    seconds: dict[str, float]


Begin = Callable[[dict[str, int], float], Callable[[int], object]]


def diagnose_run(
    folder: Path,
    config: Config,
    workers: Workers,
    checkpoint: str,
    count: int,
    only: Sequence[str] | None,
    allowed: tuple[str, ...],
    begin: Begin = lambda costs, seconds: lambda cost: None,
) -> RunDiagnosis:
    """Diagnose the evaluated model of a run on some batches of its epoch, augmented as there.

    Nothing of the run changes. The early model of "shift" is the initial one.

    *Collectives*: broadcasts of checkpoint and buffers, a gathering of failures, and those of
    `diagnose`; every worker must call. Workers may be as many as they like: a batch has the parts
    that it has on the workers of the training, and each worker here takes whole ones.

    Args:
        folder: of the run.
        config: of the run.
        workers: this worker's rank and device.
        checkpoint: its name.
        count: of batches.
        only: the measures; None: all.
        allowed: packages whose callables the configuration may name.
        begin: given this worker's cost of each measure and the seconds to come, before the first;
            returns what is called with the cost of each pass that is done.

    Raises:
        ConfigError: bad input, samples that cannot be read, or a loss that cannot be computed; on
            all workers.
    """
    snapshot = share_evaluated(folder, checkpoint, workers)
    signature = signature_of(snapshot, folder)
    with closing(load_feed(config, workers.device, allowed)) as feed:
        task = task_of(config, workers.device, feed, allowed)
        model = make_evaluated(config, signature, snapshot, folder, workers.device, allowed)
        freeze(model, config.train.freeze)
        early = _initial_model(config, signature, workers, allowed)
        parts = int(snapshot.facts.get("world_size", workers.world_size))
        samples = min(config.train.global_batch, feed.sizes[TRAIN])
        plan = plan_step(config, model, task, parts, samples)
        model = prepare_ddp(model)
        for layer in model.modules():
            if isinstance(layer, Pooling):
                layer.gradient_scale = parts
        problem = Problem(
            model,
            _loss(config, task, workers),
            _load(feed, config, snapshot, workers, plan, count),
            parts=parts,
            samples=plan.smallest,
            lr=_rate(config, snapshot),
            frozen=snapshot.facts["in_evaluation"],
            # Of the training, whose lagged layers keep averages of gradients with it.
            scale=parts,
        )

        def start(costs: dict[str, int], seconds: float) -> None:
            problem.tick = begin(costs, seconds)

        try:
            found = diagnose(problem, early, only, start)
        except InputError as error:
            raise ConfigError(str(error)) from error
        return RunDiagnosis(
            config.name or folder.resolve().name,
            snapshot.step,
            parts,
            len(problem.batches),
            samples,
            problem.lr,
            found.measures,
            [asdict(each) for each in advise(found.measures)],
            found.seconds,
        )


def _initial_model(
    config: Config, signature: Signature, workers: Workers, allowed: tuple[str, ...]
) -> nn.Module | None:
    """Build the model with the values that the run began with; None if they are not there."""
    with rng.kept():
        model = make_network(config, signature, 1, allowed)
    model.to(workers.device, getattr(torch, config.train.dtype))
    try:
        load_weights(model, config.model, workers)
    except ConfigError as error:
        _log.warning("the shift since the beginning is left out: %s", error)
        return None
    return model


def _rate(config: Config, snapshot: Snapshot) -> float:
    """The learning rate of the checkpoint, or a hundredth of the highest if that is more."""
    groups = snapshot.states.get("optimizer", {}).get("param_groups", [])
    now = max((float(each["lr"]) for each in groups), default=config.train.lr)
    return max(now, _LEAST_OF_LR * config.train.lr)


def _loss(config: Config, task: Task, workers: Workers) -> Callable[[nn.Module, Any], Any]:
    def loss(model: nn.Module, batch: Any) -> Any:
        with autocast(config, workers.device):
            return loss_terms(task, model, batch)

    return loss


def _load(
    feed: Feed, config: Config, snapshot: Snapshot, workers: Workers, plan: Plan, count: int
) -> list[list[Forward]]:
    """Load this worker's forwards of some batches of the checkpoint's epoch.

    Raises:
        ConfigError: samples cannot be read; on all workers.
    """
    epoch = max(1, int(snapshot.facts.get("position", {}).get("epoch", 1)))
    order = training_order(config, feed, epoch).to(feed.index_device)
    step = min(config.train.global_batch, len(order))
    whole = len(order) // step
    number = min(count, whole)
    # Spread over the epoch, whose beginning may be unlike its end.
    batches = [order.split(step)[whole * i // number] for i in range(number)]
    mine = plan.of_worker(workers.rank, workers.world_size)
    forwards = [
        (number, {p: size(cut) for p, cut in parts.items()}, _chosen(indices, parts))
        for number, indices in enumerate(batches)
        for parts in mine
    ]
    found: list[list[Forward]] = [[] for _ in batches]
    failure = ""
    loaded = feed.batches(TRAIN, [indices for _, _, indices in forwards], epoch)
    for (number, sizes, _), batch in zip(forwards, loaded, strict=False):
        if isinstance(batch, ReadFailure):
            failure = batch.message
            break
        found[number].append(Forward(batch, sizes))
    raise_read_failure(failure)
    return found


def _chosen(indices: Tensor, parts: Part) -> Tensor:
    return torch.cat([indices[:0], *(indices[cut] for cut in parts.values())])
