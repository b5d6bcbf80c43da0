"""Which module made a tensor that another one is given."""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class Makers(Generic[T]):
    """Remembers who made tensors, as long as they are alive and nobody has written to them.

    A view of the whole of a tensor counts as the tensor.
    """

    def __init__(self) -> None:
        # By identity: a dead tensor's number may be another's.
        self._made: dict[int, tuple[weakref.ref[Tensor], int, T]] = {}

    def note(self, output: Any, maker: T) -> None:
        """Remember the maker of a module's output, if that is a tensor."""
        if isinstance(output, Tensor):
            memory = _memory(output)
            self._made[id(memory)] = weakref.ref(memory), _version(memory), maker

    def maker_of(self, x: Any) -> T | None:
        """Find who made x; None: nobody that is known, or it has been changed since."""
        if not isinstance(x, Tensor):
            return None
        memory = _memory(x)
        known, version, maker = self._made.get(id(memory), (lambda: None, 0, None))
        return maker if known() is memory and version == _version(memory) else None


def _memory(x: Tensor) -> Tensor:
    """The tensor that x is a view of, if it is one of all of it, else x."""
    base = x._base
    return x if base is None or base.numel() != x.numel() else base


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
