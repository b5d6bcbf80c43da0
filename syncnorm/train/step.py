"""One optimizer step and one evaluation, each over all workers together.

`training_step` is the whole of a step; the functions below it are in the order in which it calls
them. The rare cases stand elsewhere: the first step of a process and values that are not finite in
`syncnorm.train.diagnose`, a model's own buffers in `syncnorm.train.buffers`.
"""

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
from syncnorm.model.modes import evaluating
from syncnorm.module import SyncNorm
from syncnorm.placement import Placement
from syncnorm.shards import Shard
from syncnorm.train.data.augment import augment
from syncnorm.train.data.datasets import Dataset, Split
from syncnorm.train.notes import Notes, PendingNotes
from syncnorm.train.setup import Setup, seed_random, step_seed


@dataclass(frozen=True)
class StepBatch:
    """The samples of one step, on all workers together.

    Args:
        indices: of the training set, (N,), in the order that the configuration fixes. On the data's
            device, so that no step waits for a copy.
        epoch: from 1.
        step: of the run, from 1.
    """

    indices: Tensor
    epoch: int
    step: int


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step, the same on all workers.

    Args:
        losses: each worker's share of the mean loss, in rank order.
        grad_norm: of the whole gradient before clipping; None where it is not clipped.
        stop: True if some worker was asked to stop.
        was_taken: True if the optimizer has stepped; False if something was not finite.
    """

    losses: list[float]
    grad_norm: float | None
    stop: bool
    was_taken: bool

    @property
    def loss(self) -> float:
        """Mean over the samples of the step."""
        return math.fsum(self.losses)


def training_step(setup: Setup, data: Dataset, batch: StepBatch, stop: bool) -> StepResult:
    """Take one optimizer step, computing this worker's part of it.

    If a loss or the gradient's norm is not finite, parameters stay as they are; and with
    `train.not_finite: skip` the buffers do, too.

    *Collectives*: the layers' statistics, one sum of the workers' notes, DDP's gradients, and a
    broadcast of the model's own buffers if it has some; every worker must call.

    Args:
        setup: the model and its optimizer.
        data: the training set.
        batch: the samples of the step, the same on all workers.
        stop: True if this worker was asked to stop.
    """
    skips = setup.config.train.not_finite == "skip"
    before = setup.copy_buffers() if skips else []
    seed_random(step_seed(setup.config.train.seed, batch.step, setup.workers.rank))
    setup.optimizer.zero_grad(set_to_none=True)
    notes = _compute_gradient(setup, data, batch, stop)
    grad_norm = _clip(setup)
    was_taken = all(map(math.isfinite, [*notes.losses, grad_norm or 0.0]))
    if was_taken:
        setup.optimizer.step()
        setup.shared_buffers.broadcast(are_alike=notes.are_alike)
        setup.update_average()
    elif skips:
        setup.restore_buffers(before)
    if was_taken or skips:
        setup.schedule.step()
    return StepResult(notes.losses, grad_norm, notes.stop, was_taken)


def _compute_gradient(setup: Setup, data: Dataset, batch: StepBatch, stop: bool) -> Notes:
    """Run this worker's forwards and backwards; DDP sums the gradients during the last backward."""
    placement = setup.placement(len(batch.indices))
    loss = torch.zeros((), dtype=torch.float64, device=setup.workers.device)
    pending = None
    with _one_update(setup, placement):
        for number, parts in enumerate(placement.rounds, start=1):
            is_last = number == len(placement.rounds)
            with nullcontext() if is_last else setup.ddp.no_sync():
                share = _loss_share(setup, data, batch, placement, parts)
                loss += share.detach()
                if is_last:  # the notes travel while the backward pass runs
                    pending = PendingNotes(setup, loss, stop)
                # DDP averages over the workers; a step's gradient is the sum of their shares.
                Shard.scaled_losses += 1
                (share * setup.workers.world_size).backward()
    assert pending is not None
    return pending.read()


def _one_update(setup: Setup, placement: Placement) -> AbstractContextManager[Any]:
    # One forward makes one update by itself, and sends its message while the backward pass runs.
    # All workers must send it at the same point, also one that has fewer forwards than others.
    return one_update(setup.model) if placement.has_rounds else nullcontext()


def one_update(model: nn.Module) -> AbstractContextManager[Any]:
    """Make the context in which all forwards together update the running statistics once."""
    has_layers = any(isinstance(module, SyncNorm) for module in model.modules())
    return accumulate(model) if has_layers else nullcontext()


def _loss_share(
    setup: Setup, data: Dataset, batch: StepBatch, placement: Placement, parts: tuple[slice, ...]
) -> Tensor:
    """Compute a forward's share of the step's mean loss; for no samples a zero with a gradient."""
    images, labels = load_images(setup, data, batch, parts)
    setup.set_norm_batches(placement, parts)
    with setup.autocast():
        return F.cross_entropy(setup.ddp(images), labels, reduction="sum") / len(batch.indices)


def load_images(
    setup: Setup, data: Dataset, batch: StepBatch, parts: tuple[slice, ...]
) -> tuple[Tensor, Tensor]:
    """Gather a forward's images (n, C, H, W), standardised and augmented, and its labels (n,)."""
    config, indices = setup.config, torch.cat([batch.indices[part] for part in parts])
    images = data.standardise(data.train.images[indices], getattr(torch, config.train.dtype))
    images = augment(images, indices, config.data.augment, config.train.seed, batch.epoch)
    return images, data.train.labels[indices]


def _clip(setup: Setup) -> float | None:
    """Clip the gradient's norm, which is the same on all workers.

    The host waits for the backward pass: the norm decides whether the optimizer steps.
    """
    bound = setup.config.train.clip
    if bound is None:
        return None
    return nn.utils.clip_grad_norm_(setup.model.parameters(), bound).item()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Dataset,
    shard: Split,
    chunk: int,
    dtype: torch.dtype,
    alive: Callable[[], object] = lambda: None,
) -> float:
    """Compute the accuracy on all workers' shards together, from exact counts.

    Each module keeps its mode.

    *Collectives*: one sum of two counts; every worker must call.

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
            logits = model(data.standardise(part.images, dtype))  # (n, num_classes)
            counts[0] += (logits.argmax(1) == part.labels).sum()
            counts[1] += len(part)
            alive()
    dist.all_reduce(counts)
    correct, total = counts.tolist()
    return correct / total
