"""Which collectives a piece of code makes, whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_NAMESPACES = ("c10d", "_c10d_functional")
# Waiting for a result is no message.
_NO_MESSAGE = ("wait_tensor",)


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Collect the collectives made within the block: name, and how many numbers this worker sends."""
    mode = _Counting()
    with mode:
        yield mode.seen


class _Counting(TorchDispatchMode):
    """torch.distributed's functions end in operators, which a mode sees on their way."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__.strip("_")
        if func.namespace in _NAMESPACES and name not in _NO_MESSAGE:
            # An all-gather's input comes after its output.
            sent = args[1] if name.startswith("allgather") else args[0]
            self.seen.append((name, _numel(sent)))
        return func(*args, **(kwargs or {}))


def _numel(sent: Any) -> int:
    return sent.numel() if isinstance(sent, Tensor) else sum(_numel(part) for part in sent)
