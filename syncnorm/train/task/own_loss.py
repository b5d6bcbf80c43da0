"""The task of models that compute their loss themselves, in the forward that takes the targets."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from syncnorm.errors import ConfigError
from syncnorm.train.task import Model, Share


class OwnLoss:
    """The loss that the model returns, a mean over its samples.

    It is a tensor, the `loss` of an object or of a mapping (transformers), or else the sum of a
    mapping's values (detectors of torchvision). A batch is called as `model(**batch)` if it is a
    mapping, and else as `model(*batch)`.

    A mean over something else than samples, such as the boxes of a worker, makes the run depend on
    the number of workers: a task of your own can return its sum and count.
    """

    best = "-loss"

    def loss(self, model: Model, batch: Any) -> tuple[Tensor, int]:
        """Multiply the model's mean by the number of samples."""
        count = samples_of(batch)
        loss = loss_of(_call(model, batch))
        if loss is None:
            raise ConfigError(
                "`model.name` must give a model that returns its loss, for task.name own_loss: a "
                "tensor of shape (), an object with `loss`, or a mapping of losses"
            )
        if not count:  # the mean of nothing is NaN; its graph is needed all the same
            return torch.nan_to_num(loss) * 0, 0
        return loss * count, count

    def metrics(self, model: Model, batch: Any) -> dict[str, Share]:
        """Compute the loss, if the model computes it in evaluation mode, too."""
        loss = loss_of(_call(model, batch))
        count = samples_of(batch)
        return {} if loss is None else {"loss": (loss * count, count)}


def loss_of(returned: Any) -> Tensor | None:
    """Find the loss in what a model returns."""
    if isinstance(returned, Tensor):
        return returned if returned.ndim == 0 else None
    if isinstance(returned, Mapping) and "loss" not in returned:
        terms = [value for value in returned.values() if isinstance(value, Tensor)]
        if not terms or any(term.ndim for term in terms) or len(terms) < len(returned):
            return None
        return torch.stack(terms).sum()
    found = returned["loss"] if isinstance(returned, Mapping) else getattr(returned, "loss", None)
    return found if isinstance(found, Tensor) and found.ndim == 0 else None


def samples_of(batch: Any) -> int:
    """Count the samples of a batch: the length of its first tensor or list."""
    values = batch.values() if isinstance(batch, Mapping) else batch
    return len(next(value for value in values if isinstance(value, Tensor | list | tuple)))


def _call(model: Model, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)
