"""A record of the collectives that any code makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from syncnorm.comm import exchange
from syncnorm.comm.groups import Group
from syncnorm.undocumented import TorchDispatchMode

_NAMESPACES = ("c10d", "_c10d_functional")
# Waiting for a result is no message.
_NO_MESSAGE = ("wait_tensor",)


@contextmanager
def counted(size: Callable[[Tensor], int] = Tensor.numel) -> Iterator[list[tuple[str, int]]]:
    """Collect the collectives made within the block: name, and the size of what was sent.

    Those that our layers send through the native library are no operators; they are announced.

    Args:
        size: of a tensor; its number of elements if not given.
    """
    mode = _Counting(size)

    def announce(way: str, numbers: int, _: Group) -> None:
        if way == "native sum":
            sent = torch.empty(numbers, dtype=torch.float64, device="meta")
            mode.seen.append(("allreduce", size(sent)))

    exchange.announcers.append(announce)
    try:
        with mode:
            yield mode.seen
    finally:
        exchange.announcers.remove(announce)


class _Counting(TorchDispatchMode):
    """A mode that sees the operators in which torch.distributed's functions end."""

    def __init__(self, size: Callable[[Tensor], int]) -> None:
        super().__init__()
        self._size = size
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__.strip("_")
        if func.namespace in _NAMESPACES and name not in _NO_MESSAGE:
            # An all-gather's input comes after its output.
            sent = args[1] if name.startswith("allgather") else args[0]
            self.seen.append((name, self._sum(sent)))
        return func(*args, **(kwargs or {}))

    def _sum(self, sent: Any) -> int:
        return self._size(sent) if isinstance(sent, Tensor) else sum(map(self._sum, sent))
