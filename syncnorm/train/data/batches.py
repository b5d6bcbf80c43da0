"""Batches of any shape: made of samples, emptied, and moved to a device."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from syncnorm.errors import in_one_line


@dataclass(frozen=True)
class ReadFailure:
    """Stand-in for a sample or a batch that could not be read. As a value it passes any process.

    Args:
        message: the cause, for the user.
        instead: a batch of no samples, with which a worker takes part in a step that fails.
    """

    message: str
    instead: Any = None


class Collate:
    """Makes a batch of a list of samples, or a `ReadFailure`.

    Arrays of numpy become tensors, also those in the batch of a collate of the user's.

    Args:
        collate: the user's; None: torch's default_collate.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], Any] | None = None) -> None:
        self._collate = collate

    def __call__(self, samples: Sequence[Any]) -> Any:
        failed = next((sample for sample in samples if isinstance(sample, ReadFailure)), None)
        if failed is not None:
            return failed
        try:
            if self._collate is not None:
                return as_tensors(self._collate(list(samples)))
            return default_collate(list(samples))
        except Exception as error:  # of the user's code, or of samples that do not fit together
            cause = in_one_line(error)
            remedy = "" if self._collate else _remedy(samples)
            return ReadFailure(f"`data.name` must give samples that make a batch: {cause}.{remedy}")


def _remedy(samples: Sequence[Any]) -> str:
    """Say how samples that default_collate refuses can be mended."""
    members = [list(leaves(sample)) for sample in samples]
    types = {_type_name(leaf) for leaf in members[0]}
    if any(name.startswith("PIL.") for name in types):
        return (
            " An image of PIL must become a tensor in your data set: "
            "torchvision.transforms.functional.to_tensor(image) makes one."
        )
    shapes = [[tuple(leaf.shape) for leaf in some if hasattr(leaf, "shape")] for some in members]
    for number, other in enumerate(shapes):
        if other != shapes[0]:
            return (
                f" Sample 0 of the batch has the shapes {shapes[0]}, sample {number} {other}: give "
                "them one shape, or return Splits(..., collate=...) with a collate of yours."
            )
    return " A collate of yours, Splits(..., collate=...), takes samples of any kind."


def leaves(sample: Any) -> Iterator[Any]:
    """Iterate over what a sample is made of, through the containers of `map_members`."""
    found: list[Any] = []

    def keep(member: Any) -> Any:
        if map_members(member, keep) is member:
            found.append(member)
        return member

    keep(sample)
    return iter(found)


def as_tensors(batch: Any) -> Any:
    """Make tensors of the arrays of numpy in a batch."""
    if type(batch) is np.ndarray:
        return torch.as_tensor(batch)
    return map_members(batch, as_tensors)


def empty_like(batch: Any) -> Any:
    """Make a batch of no samples of a batch of one.

    The rule: a tensor with dimensions loses its rows, and one without stays. A list or a plain
    tuple of length 1 holds an entry for each sample, and becomes empty. Of mappings, of named
    tuples, of dataclasses, and of lists and tuples of other lengths, each member is emptied. All
    else stays. So a batch whose tensors do not have a row for each sample (all boxes of all images,
    say) must be a mapping whose rows can be dropped alike.
    """
    if isinstance(batch, Tensor):
        return batch[:0] if batch.ndim else batch
    if type(batch) in (list, tuple) and len(batch) == 1:
        return batch[:0]
    return map_members(batch, empty_like)


def to_device(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move the tensors of a batch to a device, the floating ones in `dtype`.

    An object that is none of the containers of `map_members` and has a method `to(device)` moves
    itself.
    """
    if isinstance(batch, Tensor):
        wanted = dtype if batch.is_floating_point() else batch.dtype
        return batch.to(device, wanted, non_blocking=True)
    moved = map_members(batch, lambda member: to_device(member, device, dtype))
    if moved is batch and callable(getattr(type(batch), "to", None)):
        return batch.to(device)
    return moved


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
    """Change each member of a mapping, a list, a tuple or a dataclass; all else is returned."""
    if isinstance(batch, Mapping):
        changed = {key: change(member) for key, member in batch.items()}
        if type(batch) is dict:
            return changed
        if isinstance(batch, MutableMapping):  # it may have more than its items
            copied = copy.copy(batch)
            copied.update(changed)
            return copied
        return type(batch)(changed)  # pyright: ignore[reportCallIssue]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(change, batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map(change, batch))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        names = [field.name for field in dataclasses.fields(batch) if field.init]
        return dataclasses.replace(batch, **{n: change(getattr(batch, n)) for n in names})
    return batch


def _type_name(value: object) -> str:
    # By name: PIL need not be there.
    return f"{type(value).__module__}.{type(value).__qualname__}"
