"""Diagnoses beside the path of a step: warnings of the first one; values that are not finite."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from syncnorm import rng
from syncnorm.errors import SyncnormError, join_first
from syncnorm.model.lints import Call, decay_lints, model_lints, recorded_calls
from syncnorm.model.sample import uncompiled
from syncnorm.train import buffers
from syncnorm.train.data.batches import tensors_of
from syncnorm.train.data.feed import TRAIN, Feed
from syncnorm.train.setup import Setup, active_dropout, step_seed
from syncnorm.train.step import StepBatch, StepResult, one_update, training_step
from syncnorm.train.step_notes import Flags
from syncnorm.train.task.losses import loss_terms
from syncnorm.train.waiting import from_all

_log = logging.getLogger(__name__)
_MOST_NAMES = 8


class NotFiniteError(SyncnormError):
    """A loss or a gradient is infinite or NaN; raised by all workers alike."""


def first_step(setup: Setup, batches: Iterator[Any], batch: StepBatch, flags: Flags) -> StepResult:
    """Take the first `training_step` of a process, and warn of what it alone can show.

    That is parameters without a part in the loss, buffers of the model's own that change, and what
    `syncnorm.model.lints` finds in the order of the layers.
    """
    slots = setup.shared_buffers.slots
    before = {name: value.clone() for name, value in buffers.values(slots).items()}
    with rng.kept():
        rng.seed_all(step_seed(setup.config.train.seed, batch.step, setup.workers.rank))
        undrawn = torch.get_rng_state()
    with _recorded(setup) as calls:
        result = training_step(setup, batches, batch, flags)
    # Of layers of dropout a line has spoken already.
    if not (active_dropout(setup.model) or torch.equal(torch.get_rng_state(), undrawn)):
        _log.warning(
            "the model or the loss draws random numbers: they depend on the number of workers, and "
            "so does the run"
        )
    for lint in model_lints(setup.model, calls):
        _log.warning("%s", lint)
    for lint in decay_lints(setup.model, calls, setup.optimizer):
        _log.info("%s", lint)
    unused = [
        name for name, p in setup.model.named_parameters() if p.requires_grad and p.grad is None
    ]
    if unused:
        _log.warning(
            "parameters without a part in the loss of step %d, which are left as they are in such "
            "steps: %s",
            batch.step,
            join_first(unused, _MOST_NAMES),
        )
    changed = [
        name
        for name, value in buffers.values(slots).items()
        if name not in before or not torch.equal(before[name], value)
    ]
    if changed:
        _log.warning(
            "buffers of the model's own that training changes: %s. All workers go on with worker "
            "0's: where they come from samples, the run depends on the number of workers",
            join_first(changed, _MOST_NAMES),
        )
    return result


def _recorded(setup: Setup) -> AbstractContextManager[list[Call]]:
    # Hooks that come and go would have a compiled model compiled anew.
    return nullcontext([]) if setup.config.train.compile else recorded_calls(setup.model)


def describe_not_finite(setup: Setup, feed: Feed, batch: StepBatch, result: StepResult) -> str:
    """Name the workers whose losses are not finite, and the first layer whose output is not.

    The forwards of the step are made again, with a hook on every layer.

    *Collectives*: those of the forwards, and one gathering of findings; every worker must call.
    """
    found = from_all(_first_not_finite(setup, feed, batch))
    bad = [rank for rank, loss in enumerate(result.losses) if not math.isfinite(loss)]
    what = f"the loss of worker(s) {', '.join(map(str, bad))}" if bad else "the gradient"
    findings = [(*finding, rank) for rank, finding in enumerate(found) if finding]
    where = "every layer's output is finite: look at the loss"
    if findings:
        _, name, rank = min(findings, key=lambda finding: (finding[0], finding[2]))
        where = f"first at {name} on worker {rank}"
    return f"step {batch.step}: {what} is not finite, {where}"


def _first_not_finite(setup: Setup, feed: Feed, batch: StepBatch) -> tuple[int, str] | None:
    """Find the first value on this worker that is not finite: its number in a forward, its name."""
    for name, parameter in setup.model.named_parameters():
        if not parameter.isfinite().all():
            # Alike on all workers, which must all make the forwards or none.
            return -1, f"parameter {name!r}"
    found: list[tuple[int, str]] = []
    # The order of construction stands for that of the forward, which workers may make different
    # numbers of times.
    modules = [
        (name, module)
        for name, module in setup.model.named_modules()
        # Those that torch.jit has compiled take no hooks.
        if not (any(module.children()) or isinstance(module, torch.jit.ScriptModule))
    ]
    with ExitStack() as stack:
        for order, (name, module) in enumerate(modules, start=1):
            stack.callback(module.register_forward_hook(_finder(found, order, name)).remove)
        _repeat_forwards(setup, feed, batch, found)
    return min(found, default=None)


def _finder(
    found: list[tuple[int, str]], order: int, name: str
) -> Callable[[nn.Module, Any, Any], None]:
    def find(module: nn.Module, args: Any, output: Any) -> None:
        if not found and isinstance(output, Tensor) and not output.isfinite().all():
            found.append((order, f"the output of layer {name!r} ({type(module).__name__})"))

    return find


@torch.no_grad()
def _repeat_forwards(
    setup: Setup, feed: Feed, batch: StepBatch, found: list[tuple[int, str]]
) -> None:
    placement, before = setup.placement(len(batch.indices)), setup.copy_buffers()
    with one_update(setup.model), uncompiled():
        for parts, indices in zip(placement.rounds, setup.forwards(batch.indices), strict=True):
            samples = feed.load(TRAIN, indices, batch.epoch)
            if not all(tensor.isfinite().all() for tensor in tensors_of(samples)):
                found.append((0, "the samples"))
            setup.set_norm_batches(placement, parts)
            with setup.autocast():
                loss_terms(setup.task, setup.model, samples)
    setup.restore_buffers(before)
