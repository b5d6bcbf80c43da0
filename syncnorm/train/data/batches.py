"""Batches of any shape: made of samples, emptied, and moved to a device."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate


@dataclass(frozen=True)
class Failure:
    """In place of a sample or a batch that could not be read. As a value it passes any process.

    Args:
        message: the cause, for the user.
        instead: a batch of no samples, with which a worker takes part in a step that fails.
    """

    message: str
    instead: Any = None


class Collate:
    """Makes a batch of a list of samples, or a `Failure`.

    Args:
        collate: the user's; None: torch's default_collate.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], Any] | None = None) -> None:
        self._collate = collate

    def __call__(self, samples: Sequence[Any]) -> Any:
        failed = next((sample for sample in samples if isinstance(sample, Failure)), None)
        if failed is not None:
            return failed
        try:
            return (self._collate or default_collate)(list(samples))
        except Exception as error:  # of the user's code, or of samples that do not fit together
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            remedy = (
                "" if self._collate else " Samples of different shapes need a collate of yours."
            )
            return Failure(f"`data.name` must give samples that make a batch: {cause}.{remedy}")


def empty_like(batch: Any) -> Any:
    """Make a batch of no samples of a batch of one.

    Tensors lose their only row; lists and tuples of length 1 hold an entry for each sample, and
    become empty; of mappings, and of lists and tuples of other lengths, each member is emptied.
    """
    if isinstance(batch, Tensor):
        return batch[:0] if batch.ndim else batch
    if isinstance(batch, list | tuple) and len(batch) == 1:
        return batch[:0]
    return map_members(batch, empty_like)


def to_device(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move the tensors of a batch to a device, the floating ones in `dtype`."""
    if isinstance(batch, Tensor):
        wanted = dtype if batch.is_floating_point() else batch.dtype
        return batch.to(device, wanted, non_blocking=True)
    return map_members(batch, lambda member: to_device(member, device, dtype))


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Yield the floating tensors of a batch."""
    found: list[Tensor] = []

    def keep(member: Any) -> Any:
        if isinstance(member, Tensor):
            found.append(member)
            return member
        return map_members(member, keep)

    keep(batch)
    return (tensor for tensor in found if tensor.is_floating_point())


def map_members(batch: Any, change: Callable[[Any], Any]) -> Any:
    """Change each member of a mapping, a list, a tuple or a dataclass; others stay."""
    if isinstance(batch, Mapping):
        changed = {key: change(member) for key, member in batch.items()}
        return changed if type(batch) is dict else type(batch)(changed)  # pyright: ignore[reportCallIssue]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(change, batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map(change, batch))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        names = [field.name for field in dataclasses.fields(batch) if field.init]
        return dataclasses.replace(batch, **{n: change(getattr(batch, n)) for n in names})
    return batch
