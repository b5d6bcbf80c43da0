"""The first step of a process, and what it alone can tell of a model: one line of warning for each."""

import logging

import torch
from torch import Tensor

from syncnorm.train import buffers
from syncnorm.train.data.datasets import Dataset
from syncnorm.train.setup import Learner
from syncnorm.train.step import StepBatch, StepResult, training_step

_log = logging.getLogger(__name__)
_MOST_NAMES = 8


def first_step(learner: Learner, data: Dataset, batch: StepBatch, stop: bool) -> StepResult:
    """`training_step`, and a look at which parameters had no part in it, and which buffers of its
    own it changed.
    """
    before = {name: value.clone() for name, value in buffers.values(learner.shared.places).items()}
    result = training_step(learner, data, batch, stop)
    unused = [
        name for name, p in learner.model.named_parameters() if p.requires_grad and p.grad is None
    ]
    if unused:
        _log.warning(
            "parameters without a part in the loss of step %d, which are left as they are in such "
            "steps: %s",
            batch.step,
            _listed(unused),
        )
    changed = [
        name
        for name, value in buffers.values(learner.shared.places).items()
        if _is_other(before, name, value)
    ]
    if changed:
        _log.warning(
            "buffers of the model's own that training changes: %s. All workers go on with worker "
            "0's: where they come "
            "from samples, the run depends on the number of workers",
            _listed(changed),
        )
    return result


def _is_other(before: dict[str, Tensor], name: str, value: Tensor) -> bool:
    return name not in before or not torch.equal(before[name], value)


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
