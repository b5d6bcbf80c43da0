"""Where a loss stopped being finite: which worker, and which layer."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncnorm.errors import SyncnormError
from syncnorm.train.data.datasets import Dataset
from syncnorm.train.setup import Learner
from syncnorm.train.step import StepBatch, StepResult, images_of, one_update


class NotFiniteError(SyncnormError):
    """A loss or a gradient is infinite or NaN; raised by all workers alike."""


def describe_not_finite(
    learner: Learner, data: Dataset, batch: StepBatch, result: StepResult
) -> str:
    """Say which workers' losses are not finite, and the first place in the network that is not.

    The forwards of the step are made again, with every layer looked at.

    *Collectives*: those of the forwards, and one gathering of findings; every worker must call.
    """
    rank = learner.workers.rank
    found: list[tuple[int, str] | None] = [None] * learner.workers.world_size
    dist.all_gather_object(found, _first_place(learner, data, batch))
    bad = [rank for rank, loss in enumerate(result.losses) if not _is_finite(loss)]
    what = f"the loss of worker(s) {', '.join(map(str, bad))}" if bad else "the gradient"
    places = [
        (order, rank, place) for rank, one in enumerate(found) if one for order, place in [one]
    ]
    where = "every layer's output is finite: look at the loss"
    if places:
        _, rank, place = min(places)
        where = f"first at {place} on worker {rank}"
    return f"step {batch.step}: {what} is not finite, {where}"


def _is_finite(value: float) -> bool:
    return value - value == 0


def _first_place(learner: Learner, data: Dataset, batch: StepBatch) -> tuple[int, str] | None:
    """The first place on this worker, with its number in the order of a forward."""
    for name, parameter in learner.model.named_parameters():
        if not parameter.isfinite().all():
            # Alike on all workers, which must all make the forwards or none.
            return -1, f"parameter {name!r}"
    found: list[tuple[int, str]] = []
    # The order of construction stands for that of the forward, which workers may make different
    # numbers of times.
    modules = [
        (name, module)
        for name, module in learner.model.named_modules()
        if not any(module.children())
    ]
    with ExitStack() as stack:
        for order, (name, module) in enumerate(modules, start=1):
            stack.callback(module.register_forward_hook(_look(found, order, name)).remove)
        _forwards(learner, data, batch, found)
    return min(found, default=None)


def _look(
    found: list[tuple[int, str]], order: int, name: str
) -> Callable[[nn.Module, Any, Any], None]:
    def look(module: nn.Module, args: Any, output: Any) -> None:
        if not found and isinstance(output, Tensor) and not output.isfinite().all():
            found.append((order, f"the output of layer {name!r} ({type(module).__name__})"))

    return look


@torch.no_grad()
def _forwards(
    learner: Learner, data: Dataset, batch: StepBatch, found: list[tuple[int, str]]
) -> None:
    placement, before = learner.place(len(batch.indices)), learner.buffers()
    with one_update(learner.model), torch.compiler.set_stance("force_eager"):
        for parts in placement.rounds:
            images, _ = images_of(learner, data, batch, parts)
            if not images.isfinite().all():
                found.append((0, "the images"))
            learner.announce(placement, parts)
            with learner.precision():
                learner.model(images)
    learner.put_back(before)
