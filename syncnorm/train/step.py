"""One optimizer step and one evaluation, each over all workers together.

`training_step` is the whole of a step; the functions below it are in the order in which it calls
them. The rare cases stand elsewhere: the first step of a process and values that are not finite in
`syncnorm.train.diagnose`, a model's own buffers in `syncnorm.train.buffers`, parameters without a
part in the loss in `syncnorm.train.unused`.

The gradient of a step is that of

    loss = sum over all samples / count over all samples

where the count may be known only after the forward pass. So each worker divides its sum by the
number of samples of the step, which all know; the counts come with the workers' notes, and the
summed gradient is multiplied by samples / count, if that is not 1.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from syncnorm import accumulate, rng
from syncnorm.comm import exchange, groups
from syncnorm.errors import ConfigError
from syncnorm.family.plain import clip_gradients_adaptively_
from syncnorm.model.evaluation import evaluation_statistics
from syncnorm.model.mixed import Choice
from syncnorm.model.modes import evaluating
from syncnorm.module import SyncNorm
from syncnorm.placement import Placement, shard
from syncnorm.shards import Shard
from syncnorm.train.config.schema import Config
from syncnorm.train.data.batches import ReadFailure
from syncnorm.train.data.feed import Feed
from syncnorm.train.norm import power_iterations_held
from syncnorm.train.scaling import unscale
from syncnorm.train.setup import Setup, autocast, step_seed
from syncnorm.train.step_notes import Flags, Notes, PendingNotes
from syncnorm.train.task import Number, Task
from syncnorm.train.task.losses import WHOLE, loss_terms, needs_whole_step
from syncnorm.train.task.measures import Measures
from syncnorm.train.task.meters import Meters
from syncnorm.train.waiting import from_all
from syncnorm.train.workers import Workers


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


_NO_FLAGS = Flags()


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step, the same on all workers.

    Args:
        losses: each worker's share of the mean loss, in rank order.
        grad_norm: of the whole gradient before clipping; None where it is not clipped.
        stop: True if some worker was asked to stop.
        was_taken: True if the optimizer has stepped; False if something was not finite.
        save: True if it is time to save.
        has_overflowed: True if it was not taken since the scaled gradient left float16's range, and
            a lower scale comes next.
    """

    losses: list[float]
    grad_norm: float | None
    stop: bool
    was_taken: bool
    save: bool = False
    has_overflowed: bool = False

    @property
    def loss(self) -> float:
        """Sum of the step's losses, divided by their count."""
        return math.fsum(self.losses)


def training_step(
    setup: Setup, batches: Iterator[Any], batch: StepBatch, flags: Flags = _NO_FLAGS
) -> StepResult:
    """Take one optimizer step, computing this worker's part of it.

    If a loss or the gradient's norm is not finite, parameters stay as they are; and with
    `train.not_finite: skip` the buffers do, too.

    *Collectives*: the layers' statistics, one sum of the workers' notes, DDP's gradients, a sum of
    the counts if the loss has several terms or autocast is float16, one of who has used which
    parameter if some worker has not used all, and a broadcast of the model's own buffers if it has
    some; every worker must call.

    Args:
        setup: the model and its optimizer.
        batches: the next are those of this worker's forwards.
        batch: the samples of the step, the same on all workers.
        flags: of this worker.

    Raises:
        ConfigError: samples cannot be read, or a count is none, on all workers; or, on this one,
            the task gives something else than a sum and a count.
    """
    skips = setup.config.train.not_finite == "skip"
    before = setup.copy_buffers() if skips else []
    rng.seed_all(step_seed(setup.config.train.seed, batch.step, setup.workers.rank))
    setup.optimizer.zero_grad(set_to_none=True)
    notes = _compute_gradient(setup, batches, batch, flags)
    share = _scale_gradient(setup, notes, len(batch.indices))
    losses = [loss * share for loss in notes.losses]
    is_finite, has_overflowed = all(map(math.isfinite, losses)), False
    if setup.scaler.is_enabled():
        has_overflowed, is_finite = unscale(
            setup.scaler, setup.optimizer, is_finite, setup.workers.world_size
        )
    grad_norm = None if has_overflowed else _clip(setup)
    was_taken = is_finite and not has_overflowed and math.isfinite(grad_norm or 0.0)
    if was_taken:
        setup.optimizer.step()
        setup.shared_buffers.broadcast(are_alike=notes.are_alike)
        setup.update_average()
    elif has_overflowed:
        setup.shared_buffers.broadcast(are_alike=notes.are_alike)
    elif skips:
        setup.restore_buffers(before)
    if was_taken or skips or has_overflowed:
        setup.schedule.step()
    return StepResult(losses, grad_norm, notes.stop, was_taken, notes.save, has_overflowed)


def _compute_gradient(
    setup: Setup, batches: Iterator[Any], batch: StepBatch, flags: Flags
) -> Notes:
    """Run this worker's forwards and backwards; DDP sums the gradients during the last backward.

    The notes are made before that, of the forward pass alone, and exchanged after it.
    """
    samples = len(batch.indices)
    placement = setup.placement(samples)
    loss: Tensor | None = None
    count: Number = 0
    per_sample: Tensor | None = None
    failure, pending = "", None
    # DDP averages over the workers; a step's gradient is the sum of their shares.
    weight = setup.workers.world_size / samples
    with _one_update(setup, placement), power_iterations_held(setup.spectral_norms):
        for number, parts in enumerate(placement.rounds, start=1):
            is_last = number == len(placement.rounds)
            with nullcontext() if is_last else setup.ddp.no_sync():
                samples_of_mine = next(batches)
                if isinstance(samples_of_mine, ReadFailure):
                    failure, samples_of_mine = samples_of_mine.message, samples_of_mine.instead
                total, counted = _loss_sum(setup, samples_of_mine, samples, placement, parts)
                if placement.has_rounds and setup.scaler.is_enabled():
                    # As in `_loss_sum`, but the whole count comes after the backward passes.
                    if per_sample is None:
                        per_sample = _count_per_sample(setup, counted, parts)
                    total, counted = total / per_sample, counted / per_sample
                loss = total.detach() if loss is None else loss.double() + total.detach()
                count = counted if number == 1 else count + counted
                if is_last:
                    setup.gradients.begin()
                    pending = PendingNotes(setup, loss, count)
                Shard.scaled_losses += 1
                setup.scaler.scale(total * weight).backward()
        # The others wait for it in their backward passes, before any other exchange.
        lacks = setup.gradients.complete()
    assert pending is not None
    notes = pending.exchange(flags, failed=bool(failure), lacks=lacks)
    if notes.failed:
        raise_read_failure(failure)
    if notes.lack:
        setup.gradients.drop_unused()
    return notes


def _count_per_sample(setup: Setup, count: Number, parts: tuple[slice, ...]) -> Tensor:
    """Estimate what a sample counts by the first forwards of all workers; 1 where nothing counts.

    *Collectives*: one sum; every worker must call.

    Returns:
        A power of two, by which division is exact.
    """
    samples = sum(part.stop - part.start for part in parts)
    mine = torch.stack([_as_count(n, setup.workers.device) for n in (count, samples)])
    ratio = exchange.sum_(mine, groups.statistics_group(), "counts of a forward")
    ratio = ratio[0] / ratio[1]
    return torch.where((ratio > 0) & ratio.isfinite(), ratio.log2().round().exp2(), 1.0)


def raise_read_failure(message: str) -> None:
    """Raise the workers' failures to read samples, if there are some, on all alike.

    *Collectives*: one gathering of messages; every worker must call.

    Args:
        message: of this worker; empty if it has not failed.
    """
    failed = [f"{text} (worker {rank})" for rank, text in enumerate(from_all(message)) if text]
    if failed:
        raise ConfigError("; ".join(failed))


def _one_update(setup: Setup, placement: Placement) -> AbstractContextManager[Any]:
    # One forward makes one update by itself, and sends its message while the backward pass runs.
    # All workers must send it at the same point, also one that has fewer forwards than others; and
    # how many a worker has depends on how many workers there are, while a task may call the model
    # several times in each.
    is_one = placement.has_rounds or setup.statistic_groups is not None
    return one_update(setup.model) if is_one else nullcontext()


def one_update(model: nn.Module) -> AbstractContextManager[Any]:
    """Make the context in which all forwards together update the running statistics once."""
    has_layers = any(isinstance(module, SyncNorm) for module in model.modules())
    return accumulate(model) if has_layers else nullcontext()


def _loss_sum(
    setup: Setup, batch: Any, samples: int, placement: Placement, parts: tuple[slice, ...]
) -> tuple[Tensor, Number]:
    """Compute the sum of a forward's losses, and their count."""
    setup.set_norm_batches(placement, parts)
    with setup.autocast():
        terms = loss_terms(setup.task, setup.ddp, batch)
        if placement.has_rounds and needs_whole_step(setup.task, terms):
            raise ConfigError(
                "`launch.micro_batch` must be such that each worker has its part of a step in one "
                "forward, for a loss that looks across the batch or has several terms, got several "
                "forwards. Take more workers, or leave it out."
            )
        # float16 has no room for a sum over many things: it is divided before the backward pass.
        is_counted_first = setup.scaler.is_enabled() and not placement.has_rounds
        if terms.keys() == {WHOLE} and not is_counted_first:
            return terms[WHOLE]
        return _sum_terms(setup, dict(sorted(terms.items())), samples)


def _sum_terms(
    setup: Setup, terms: dict[str, tuple[Tensor, Number]], samples: int
) -> tuple[Tensor, Number]:
    """Divide each term by its count over all workers, and multiply the sum by `samples`.

    *Collectives*: one sum of the counts; every worker must call, with terms of the same names.

    Raises:
        ExchangeError: the names differ; on all workers. (On CUDA the sum is NaN, outside of debug
            mode.)

    Returns:
        The sum, and the count that makes samples / count 1; NaN if a count of this worker's is
        none, which all workers then see.
    """
    mine = torch.stack([_as_count(n, setup.workers.device) for _, n in terms.values()])  # (terms,)
    names = ", ".join(terms)
    counts = exchange.sum_(mine, groups.statistics_group(), f"counts of {names}")
    # A term that counts nothing on any worker is 0. NaN stays.
    shares = torch.where(counts == 0, 0, 1 / counts)
    total = sum(total * share for share, (total, _) in zip(shares, terms.values(), strict=True))
    assert isinstance(total, Tensor)
    # One worker counts for all, so that samples / count is 1 to the bit.
    whole = _as_count(samples if setup.workers.is_first else 0, mine.device)
    return total * samples, torch.where((mine >= 0).all() & mine.isfinite().all(), whole, math.nan)


def _as_count(count: Number, device: torch.device) -> Tensor:
    if isinstance(count, Tensor):
        return count.detach().to(device, torch.float64)
    # Filled rather than copied: a copy from the host would wait for the device.
    return torch.full((), count, dtype=torch.float64, device=device)


def _scale_gradient(setup: Setup, notes: Notes, samples: int) -> float:
    """Multiply the gradient by samples / count, and return 1 / count.

    Raises:
        ConfigError: a count is negative or not finite; on all workers.
    """
    if not all(math.isfinite(count) and count >= 0 for count in notes.counts):
        raise ConfigError(
            "`task.name` must give a loss whose counts are finite and not negative, got "
            f"{', '.join(f'{count:g}' for count in notes.counts)} of the workers in rank order"
        )
    count = math.fsum(notes.counts)
    # Without anything to count the loss is 0.
    share = 1 / count if count else 0.0
    factor = samples / count if count else 0.0
    if factor != 1:
        gradients = [p.grad for p in setup.model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
    return share


def _clip(setup: Setup) -> float | None:
    """Clip the gradient, which is the same on all workers; return its norm, if that has a bound.

    The host waits for the backward pass then: the norm decides whether the optimizer steps.
    """
    adaptive = setup.config.train.adaptive_clip
    if adaptive is not None:
        clip_gradients_adaptively_(setup.before_the_last_linear, adaptive)
    bound = setup.config.train.clip
    if bound is None:
        return None
    return nn.utils.clip_grad_norm_(setup.model.parameters(), bound).item()


@torch.no_grad()
def evaluate(
    task: Task,
    model: nn.Module,
    feed: Feed,
    split: str,
    config: Config,
    workers: Workers,
    alive: Callable[[], object] = lambda: None,
    statistics: Choice = "running",
) -> dict[str, float]:
    """Compute the task's metrics over a split, each worker on its shard.

    Each module keeps its mode. The metric that decides comes first.

    *Collectives*: a gathering of failures, and one of sums and counts; those of
    `evaluation_statistics` in each forward, if it is not by running ones. Every worker must call.

    Args:
        task: what is measured.
        model: the bare model: DDP's forward would exchange messages, and workers have unequally
            many batches.
        feed: of the data.
        split: its name.
        config: of the run.
        workers: this worker's rank and device.
        alive: called after each batch.
        statistics: to normalise by. With others than "running" a batch is that of a training step,
            in the order of the split, whatever the number of workers.

    Raises:
        ConfigError: samples cannot be read, or workers measure different things, on all workers;
            or, on this one, the task gives something else than sums and counts.
    """
    is_pooled = statistics != "running"
    cut = _shards_of_batches if is_pooled else _chunks_of_shard
    forwards = cut(feed.sizes[split], config, workers, feed.index_device)
    measures, failure = Measures(), ""
    meters: Meters | None = getattr(task, "meters", None)
    if meters is not None:
        meters.reset()
    # By running statistics layers evaluate as they are: nothing is lent, and compiled code holds.
    chosen = evaluation_statistics(model, statistics) if is_pooled else nullcontext()
    with evaluating(model), chosen, autocast(config, workers.device):
        for number, batch in enumerate(feed.batches(split, forwards), start=1):
            if isinstance(batch, ReadFailure):
                failure = failure or batch.message
                # The layers of the others wait for those of this worker.
                if not is_pooled or number > len(forwards):
                    break
                batch = batch.instead
            measures.add(task.metrics(model, batch))
            alive()
    raise_read_failure(failure)
    first = task.best.removeprefix("-")
    metrics = measures.gather() | ({} if meters is None else meters.gather())
    return dict(sorted(metrics.items(), key=lambda item: item[0] != first))


def _chunks_of_shard(
    size: int, config: Config, workers: Workers, device: torch.device
) -> tuple[Tensor, ...]:
    """Cut this worker's shard of a split into forwards, no larger than those of training."""
    chunk = -(-config.train.global_batch // workers.world_size)
    chunk = min(chunk, config.launch.micro_batch or chunk)
    mine = shard(size, workers.rank, workers.world_size)
    indices = torch.arange(mine.start, mine.stop, device=device)
    return indices.split(chunk) if len(indices) else ()


def _shards_of_batches(
    size: int, config: Config, workers: Workers, device: torch.device
) -> tuple[Tensor, ...]:
    """Cut a split into batches as large as a step's, and take this worker's shard of each."""
    batches = torch.arange(size, device=device).split(config.train.global_batch)
    return tuple(each[shard(len(each), workers.rank, workers.world_size)] for each in batches)
