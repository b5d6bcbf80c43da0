"""A task tried on the first samples, before anything is trained: does it fit model and data?

The loss and the metrics are called as training and evaluation will call them, on copies and without
exchanges, so that a task that raises, measures nothing or gives means in place of sums says so at
once, and on all workers. The same forward tells the bytes that a sample takes.
"""

import copy
import logging
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from syncnorm.comm import exchange
from syncnorm.errors import ConfigError, in_one_line
from syncnorm.family.layer import Pooling
from syncnorm.model.modes import evaluating
from syncnorm.module import SyncNorm
from syncnorm.statistics import mode_of
from syncnorm.train.config.schema import Config
from syncnorm.train.data.feed import TRAIN, Feed, judged_split
from syncnorm.train.setup import autocast
from syncnorm.train.task import Task
from syncnorm.train.task.losses import loss_terms
from syncnorm.train.task.measures import check_metrics
from syncnorm.train.task.meters import Meters
from syncnorm.train.workers import Workers

_log = logging.getLogger(__name__)

_TRIAL_SAMPLES = 4
# So much may chance (dropout, say) change a mean; a sum doubles.
_SAME = 0.2
# What does not depend on the samples is the same to rounding.
_ROUNDING = 1e-4


def try_task(
    config: Config,
    workers: Workers,
    feed: Feed,
    model: nn.Module,
    task: Task,
    *,
    some_are_empty: bool,
) -> int:
    """Try the task's loss and metrics on the first samples; return the bytes that a sample takes.

    No exchange. The model stays as it is; random numbers are drawn.

    Args:
        config: of the run.
        workers: this worker's rank and device.
        feed: of the data.
        model: of `make_bare_model`.
        task: of `task_of`.
        some_are_empty: True if some worker has a batch without samples in some step.

    Raises:
        ConfigError: the samples, the model or the task are not what they must be.
    """
    count = min(_TRIAL_SAMPLES, feed.sizes[TRAIN])
    indices = torch.arange(count, device=feed.index_device)
    batch = feed.load(TRAIN, indices, epoch=1)
    split = judged_split(feed)
    judged = None if split is None else feed.load(split, indices[: feed.sizes[split]])
    trial = _trial_copy(model)
    if trial is None:
        return 0

    def terms_of(part: Any) -> dict[str, tuple[Tensor, Any]]:
        with autocast(config, workers.device):
            return loss_terms(task, trial, part)

    def loss_of(part: Any) -> Tensor:
        return torch.stack([total for total, _ in terms_of(part).values()]).sum()

    is_own = ":" in config.task.name
    if is_own and not getattr(task, "needs_whole_step", False):
        _warn_of_means(terms_of, batch, lambda some: feed.load(TRAIN, some, epoch=1), indices)
    per_sample = _saved_bytes(trial, partial(loss_of, batch)) // count
    half = count // 2
    if workers.device.type == "cuda" and half:
        fewer = feed.load(TRAIN, indices[:half], epoch=1)
        # What the first passes make to keep, such as the libraries' work space, is in neither.
        _peak(trial, partial(loss_of, batch), workers.device)
        less = _peak(trial, partial(loss_of, fewer), workers.device)
        more = _peak(trial, partial(loss_of, batch), workers.device)
        per_sample = max(per_sample, (more - less) // (count - half))
    # A loss that gathers has the samples of others then.
    looks_across = getattr(task, "needs_whole_step", False)
    if some_are_empty and not looks_across:
        _try_empty(terms_of, feed.load(TRAIN, indices[:0], epoch=1), workers.world_size)
    if judged is not None:
        _try_metrics(config, workers, trial, task, judged)
    return per_sample


def _try_empty(
    terms_of: Callable[[Any], dict[str, tuple[Tensor, Any]]], batch: Any, world_size: int
) -> None:
    """Try the loss of a batch without samples, which comes at the end of an epoch at the latest.

    Raises:
        ConfigError: it raises, or is not finite.
    """
    rule = (
        "`task.name` and `model.name` must take a batch without samples, which some of "
        f"{world_size} workers have in a short step, and give a finite loss, got "
    )
    try:
        terms = terms_of(batch)
    except ConfigError:
        raise
    except Exception as error:  # code of a user's may raise anything
        raise ConfigError(
            f"{rule}{in_one_line(error)}. Name sizes in place of -1 in reshape and view; or take "
            "fewer workers, or another train.global_batch."
        ) from error
    bad = [name or "the loss" for name, (total, _) in terms.items() if not total.isfinite()]
    if bad:
        raise ConfigError(
            f"{rule}one that is not in {', '.join(bad)}. A mean over nothing is NaN: give "
            'reduction="sum".'
        )


def _warn_of_means(
    terms_of: Callable[[Any], dict[str, tuple[Tensor, Any]]],
    batch: Any,
    load: Callable[[Tensor], Any],
    indices: Tensor,
) -> None:
    """Warn of losses that are means where sums are asked for: twice the samples leave them alike.

    Their counts do grow; or stay, where fewer samples have another loss. A loss that takes no sample
    twice is not looked at.
    """

    def numbers_of(part: Any) -> dict[str, tuple[float, float]]:
        pairs = terms_of(part).items()
        return {name: (total.item(), float(count)) for name, (total, count) in pairs}

    def is_like(some: dict[str, tuple[float, float]], name: str, share: float) -> bool:
        total = once[name][0]
        return name not in some or abs(some[name][0] - total) <= share * abs(total)

    once = again = numbers_of(batch)
    more: dict[str, tuple[float, float]] = {}
    fewer = more
    with suppress(Exception):  # nothing is exchanged meanwhile
        again = numbers_of(batch)
        more = numbers_of(load(torch.cat([indices] * 2)))
        fewer = numbers_of(load(indices[: -(-len(indices) // 2)]))
    means = [
        name or "the loss"
        for name, (_, count) in once.items()
        if name in more
        and once[name][0]
        and is_like(more, name, _SAME)
        # Chance is not the samples' doing.
        and (
            more[name][1] > count
            or (is_like(again, name, 0) and not is_like(fewer, name, _ROUNDING))
        )
    ]
    if means:
        _log.warning(
            "task.name should give sums, but twice the samples have the same in %s: that looks like "
            'a mean. Give reduction="sum", and the number of samples: by them workers are weighted',
            ", ".join(means),
        )


@torch.no_grad()
def _try_metrics(
    config: Config, workers: Workers, trial: nn.Module, task: Task, batch: Any
) -> None:
    meters: Meters | None = getattr(task, "meters", None)
    with (
        evaluating(trial),
        autocast(config, workers.device),
        exchange.record() as exchanges,
        nullcontext([]) if meters is None else meters.kept() as kept,
    ):
        metrics = task.metrics(trial, batch)
    if exchanges:
        raise ConfigError(
            "`task.name` must measure without exchanges, such as syncnorm.gather's: workers have "
            f"unequally many batches in an evaluation, got {len(exchanges)} for one batch"
        )
    check_metrics(metrics)
    if meters is not None:
        for outputs, targets in kept:
            meters.check(outputs, targets)
    names = [*metrics, *(meters.names if meters is not None else ())]
    best = task.best.removeprefix("-")
    # Of torchmetrics', one of several values has a number with its name.
    bare = best.rstrip("0123456789").removesuffix("_") if meters is not None else best
    if best and best not in names and bare not in names:
        raise ConfigError(
            f"`task.best` must be measured, got {best!r} of "
            f"{', '.join(names) or 'nothing that is'}. Empty is none."
        )


def _trial_copy(model: nn.Module) -> nn.Module | None:
    """Copy the model, its layers set to exchange nothing; None if it cannot be copied."""
    try:
        trial = copy.deepcopy(model)
    except Exception as error:  # modules of a user's may raise anything
        cause = in_one_line(error)
        _log.warning(
            "the model cannot be copied, so what a forward keeps of a sample is not known: %s",
            cause,
        )
        return None
    for layer in trial.modules():
        if isinstance(layer, SyncNorm):
            layer.use_mode(mode_of("none"))
        elif isinstance(layer, Pooling):
            layer.sync = "none"
    return trial


def _saved_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Measure the storages that a forward saves for its backward pass, without the parameters'."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # Held on to, so that no address is given out twice.
            held.append(tensor)
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(seen.values())


def _peak(model: nn.Module, loss: Callable[[], Tensor], device: torch.device) -> int:
    """Measure the peak of both passes on a CUDA device, in bytes."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    loss().backward()
    model.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated(device) - before
