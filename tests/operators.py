"""A list of the operators that a block runs."""

from __future__ import annotations

from typing import Any

from syncnorm.undocumented import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Collects the names of the operators, such as aten::add.Tensor, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))
