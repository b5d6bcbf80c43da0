"""Tasks: the loss of a batch and the metrics of an evaluation, as sums and counts.

A sum and its count can be added up over workers and forwards, a mean cannot: so a step on any
number of workers, with shards of any sizes, has the loss and the gradient of a single process.

`supervised.py` has the tasks of inputs and targets, `own_loss.py` that of models which compute
their loss themselves, `make.py` chooses one by the configuration, `measures.py` adds up metrics.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

Number = Tensor | float
# A sum and the number of things that it is over.
Share = tuple[Number, Number]
Model = Callable[..., Any]


class Task(Protocol):
    """The purpose of a run; a callable of the user's may return an object of any class.

    A batch is what the data set's collate makes of this worker's samples, with its floating tensors
    in `train.dtype`, on the worker's device. It may hold no sample: losses and counts are then 0,
    and the loss still has a gradient function if the model was called.
    """

    best: str
    """Name of the metric that decides which checkpoint is the best; with a leading "-" the lowest
    is; empty: none does."""

    def loss(
        self, model: Model, batch: Any
    ) -> tuple[Tensor, Number] | Mapping[str, tuple[Tensor, Number]]:
        """Compute the sum of the losses of a batch, of shape (), and their count.

        The step's loss is the sum over all workers, divided by the count over all workers. A
        mapping of several such pairs is a loss of several terms, each divided by its own count.
        Its keys must not depend on the batch.

        A loss that compares samples with each other is either a worker's own, and then depends on
        the number of workers, or gathers those of all (`syncnorm.gather`). Then the task needs an
        attribute `needs_whole_step = True`: such a step is not cut into several forwards.

        Args:
            model: called with what the model takes; it is called at least once for each batch.
            batch: of this worker.
        """
        ...

    def metrics(self, model: Model, batch: Any) -> Mapping[str, Share]:
        """Compute, for each metric, a sum and its count over a batch.

        The metric is the sum over all batches of all workers, divided by the count; with sums and
        counts of shape (K,) it is the mean of the K quotients whose count is not 0.

        Args:
            model: in evaluation mode.
            batch: of this worker, with at least one sample.
        """
        ...
