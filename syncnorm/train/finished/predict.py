"""Predictions of a run's model, as rows for people and programs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from syncnorm.errors import ConfigError
from syncnorm.train.data.inputs import Signature
from syncnorm.train.finished.load import LoadedModel
from syncnorm.train.task.builtin import TASKS, make_builtin
from syncnorm.train.task.supervised import Supervised, call

Row = dict[str, Any]


@torch.no_grad()
def predict(model: LoadedModel, samples: Tensor) -> Tensor:
    """Compute the outputs of raw samples, (N, ...), on the CPU.

    Raises:
        ConfigError: the model returns something else than one tensor.
    """
    outputs = call(model, samples)
    if outputs.ndim < 1 or len(outputs) != len(samples):
        raise ConfigError(
            f"the model must give an output for each of {len(samples)} samples, got shape "
            f"{tuple(outputs.shape)}. Use syncnorm.load, and call it as you need it."
        )
    return outputs.float().cpu() if outputs.dtype != torch.float64 else outputs.cpu()


def read(model: LoadedModel, outputs: Tensor) -> Tensor:
    """Make probabilities or values of outputs, as the run's loss takes them; own tasks' stay."""
    section = model.config.task
    if section.name not in TASKS:
        return outputs
    task = make_builtin(section.name, section.loss, section.options)
    return task.read(outputs) if isinstance(task, Supervised) else outputs


def rows_of(model: LoadedModel, outputs: Tensor, top: int = 1) -> list[Row]:
    """Make a row of each output.

    Args:
        model: of a run whose task is classify, multilabel or regress.
        outputs: (N, ...).
        top: number of classes to list.
    """
    return _MAKERS[model.task](outputs, read(model, outputs), model.signature, top)


def check_rows(task: str) -> None:
    """Refuse a task whose outputs do not make rows.

    Raises:
        ConfigError: it is one.
    """
    if task not in _MAKERS:
        raise ConfigError(
            f"`--output` must be a .npz file for task.name {task}, whose outputs are written as "
            "they are"
        )


def _classes(outputs: Tensor, probabilities: Tensor, signature: Signature, top: int) -> list[Row]:
    # By the outputs, as the accuracy does it: probabilities may round to the same value.
    # Of equal ones the first, which argmax takes, too.
    best = outputs.sort(dim=1, descending=True, stable=True).indices[:, :top]
    rows = []
    for numbers, chances in zip(best.tolist(), probabilities.gather(1, best).tolist(), strict=True):
        several = [
            {"class": number, "name": signature.name(number), "probability": chance}
            for number, chance in zip(numbers, chances, strict=True)
        ]
        rows.append(several[0] | ({"top": several} if top > 1 else {}))
    return rows


def _labels(outputs: Tensor, probabilities: Tensor, signature: Signature, top: int) -> list[Row]:
    rows = []
    for row in probabilities:
        found = (row > 0.5).nonzero().flatten().tolist()
        names = [signature.name(number) for number in found]
        rows.append({"labels": found, "names": names, "probabilities": row[found].tolist()})
    return rows


def _values(outputs: Tensor, values: Tensor, signature: Signature, top: int) -> list[Row]:
    flat = values.reshape(len(values), -1).tolist()
    return [{"value": row[0]} if len(row) == 1 else {"values": row} for row in flat]


_MAKERS: dict[str, Callable[[Tensor, Tensor, Signature, int], list[Row]]] = {
    "classify": _classes,
    "multilabel": _labels,
    "regress": _values,
}


def masks_of(outputs: Tensor) -> Tensor:
    """Compute the class of each pixel: logits (N, K, *S) -> (N, *S), of bytes if they suffice."""
    classes = outputs.argmax(1)
    return classes.to(torch.uint8) if outputs.shape[1] <= 256 else classes.to(torch.int32)
