"""One optimizer step and one evaluation, each over all workers together."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from syncnorm import accumulate
from syncnorm.comm import exchange, groups
from syncnorm.model.modes import evaluating
from syncnorm.module import SyncNorm
from syncnorm.ops import Shard
from syncnorm.train.data.augment import augment
from syncnorm.train.data.datasets import Dataset, Split
from syncnorm.train.placement import Placement
from syncnorm.train.setup import Learner, indices_of, noise_seed, seed_random


@dataclass(frozen=True)
class StepBatch:
    """The samples of one step, on all workers together.

    Args:
        indices: of the training set, (N,), in the order that the configuration fixes.
        epoch: from 1.
        step: of the run, from 1.
    """

    indices: Tensor
    epoch: int
    step: int


@dataclass(frozen=True)
class StepResult:
    """What a step showed, the same on all workers.

    Args:
        losses: each worker's share of the mean loss, in rank order.
        grad_norm: of the whole gradient before clipping; None where it is not clipped.
        stop: whether some worker was asked to stop.
        was_taken: whether the optimizer has stepped; not if something was not finite.
    """

    losses: list[float]
    grad_norm: float | None
    stop: bool
    was_taken: bool

    @property
    def loss(self) -> float:
        """Mean over the samples of the step."""
        return math.fsum(self.losses)


def training_step(learner: Learner, data: Dataset, batch: StepBatch, stop: bool) -> StepResult:
    """Take one step, of which this worker computes its part. Nothing changes if a loss is not
    finite.

    *Collectives*: the layers' statistics, one sum that tells losses and wishes to stop, DDP's
    gradients, and the first worker's buffers if the model has some of its own; every worker must
    call.

    Args:
        learner: what is trained.
        data: the training set.
        batch: the samples of the step, the same on all workers.
        stop: whether this worker was asked to stop.
    """
    skips = learner.config.train.not_finite == "skip"
    before = learner.buffers() if skips else []
    seed_random(noise_seed(learner.config.train.seed, batch.step, learner.workers.rank))
    learner.optimizer.zero_grad(set_to_none=True)
    placement = learner.place(len(batch.indices))
    loss = torch.zeros((), dtype=torch.float64, device=learner.workers.device)
    note = None
    with _one_update(learner, placement):
        for number, parts in enumerate(placement.rounds, start=1):
            is_last = number == len(placement.rounds)
            with nullcontext() if is_last else learner.ddp.no_sync():
                share = _share(learner, data, batch, placement, parts)
                loss += share.detach()
                if is_last:
                    note = _tell(loss, stop, learner)
                # DDP averages over the workers; a step's gradient is the sum of their shares.
                Shard.scaled_losses += 1
                (share * learner.workers.world_size).backward()
    assert note is not None
    stops, *told = note.wait().tolist()
    if note.mixed is not None:
        group = groups.statistics_group()
        assert group is not None, "an exchange was made"
        exchange.raise_mixed(note.mixed, group)
    losses, forms = told[: learner.workers.world_size], told[learner.workers.world_size :]
    norm = _clip(learner)
    was_taken = all(map(math.isfinite, [*losses, norm or 0.0]))
    if was_taken:
        learner.optimizer.step()
        learner.shared.share(are_alike=len(set(forms)) == 1)
        learner.follow()
    elif skips:
        learner.put_back(before)
    if was_taken or skips:
        learner.schedule.step()
    return StepResult(losses, norm, stops > 0, was_taken)


def images_of(
    learner: Learner, data: Dataset, batch: StepBatch, parts: tuple[slice, ...]
) -> tuple[Tensor, Tensor]:
    """Images, standardised and augmented, and labels of a forward."""
    config, indices = learner.config, indices_of(batch.indices, parts)
    here = indices.to(learner.workers.device)
    images = data.standardise(data.train.images[here], getattr(torch, config.train.dtype))
    images = augment(images, here, config.data.augment, config.train.seed, batch.epoch)
    return images, data.train.labels[here]


def _share(
    learner: Learner,
    data: Dataset,
    batch: StepBatch,
    placement: Placement,
    parts: tuple[slice, ...],
) -> Tensor:
    """This forward's share of the mean loss over the step; of no samples a zero that reaches every
    parameter.
    """
    images, labels = images_of(learner, data, batch, parts)
    learner.announce(placement, parts)
    with learner.precision():
        return F.cross_entropy(learner.ddp(images), labels, reduction="sum") / len(batch.indices)


def _one_update(learner: Learner, placement: Placement) -> AbstractContextManager[Any]:
    # One forward makes one update by itself, and sends its message while the backward pass runs.
    # All workers must send it at the same point, also one that has fewer forwards than others.
    return one_update(learner.model) if placement.has_rounds else nullcontext()


def one_update(model: nn.Module) -> AbstractContextManager[Any]:
    """Have the forwards within it make one update of the running statistics, if the model has
    layers of ours.
    """
    return (
        accumulate(model)
        if any(isinstance(m, SyncNorm) for m in model.modules())
        else nullcontext()
    )


def _tell(loss: Tensor, stop: bool, learner: Learner) -> exchange.Pending:
    """Begin to tell all workers whether one was asked to stop, each one's loss, and the form of its
    shared buffers.
    """
    rank, world_size = learner.workers.rank, learner.workers.world_size
    size = 1 + world_size * (2 if learner.shared else 1)
    message = torch.zeros(size, dtype=torch.float64, device=loss.device)
    message[0] = stop
    message[1 + rank] = loss
    if learner.shared:
        message[1 + world_size + rank] = learner.shared.form()
    return exchange.start_sum(message, groups.statistics_group(), "notes")


def _clip(learner: Learner) -> float | None:
    """Bound the gradient's norm; it is the same on all workers."""
    bound = learner.config.train.clip
    if bound is None:
        return None
    return nn.utils.clip_grad_norm_(learner.model.parameters(), bound).item()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Dataset,
    shard: Split,
    chunk: int,
    dtype: torch.dtype,
    alive: Callable[[], object] = lambda: None,
) -> float:
    """Return the accuracy on all workers' shards together, from exact counts. Each module keeps its
    mode.

    Args:
        model: the bare model: DDP's forward would exchange messages, and workers have unequally
            many chunks.
        data: for its standardisation.
        shard: this worker's part of the test set, perhaps empty.
        chunk: samples per forward.
        dtype: of the images.
        alive: called after each forward.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=shard.labels.device)
    with evaluating(model):
        for start in range(0, len(shard), chunk):
            part = shard[slice(start, start + chunk)]
            counts[0] += (
                model(data.standardise(part.images, dtype)).argmax(1) == part.labels
            ).sum()
            counts[1] += len(part)
            alive()
    dist.all_reduce(counts)
    correct, total = counts.tolist()
    return correct / total
