"""Buffers that are up to date whoever reads them, while an update is under way.

What others write (an average that is swapped in, a teacher's copy, a reset in a notebook) then
counts as it does with a layer that updates at once: it finds the update of the last forward made,
and is not overwritten by it later.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Sequence, ValuesView
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from syncnorm.module import SyncNorm


class Settling(Protocol):
    """What has updates under way."""

    def settle(self) -> None:
        """Apply them. May wait, but never starts an exchange."""


class CurrentBuffers(dict[str, "Tensor | None"]):
    """The dict of a layer's buffers, which applies what is under way before it is used.

    Attributes, `buffers()`, `named_buffers()` and state dicts all go through it; a test notices if
    that changes. Waits, but never starts an exchange. Which names there are can be asked without
    waiting.
    """

    source: Settling | None = None

    @classmethod
    def put_into(cls, layer: nn.Module, source: Settling) -> None:
        buffers = cls(layer._buffers)
        buffers.source = source
        layer.__dict__["_buffers"] = buffers

    def settle(self) -> None:
        if self.source is not None:
            self.source.settle()

    def __getitem__(self, name: str) -> Tensor | None:
        self.settle()
        return super().__getitem__(name)

    def __setitem__(self, name: str, value: Tensor | None) -> None:
        self.settle()
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self.settle()
        super().__delitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.settle()
        return super().get(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        self.settle()
        return super().pop(name, *default)

    def items(self) -> ItemsView[str, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.settle()
        return super().items()

    def values(self) -> ValuesView[Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.settle()
        return super().values()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy or a pickle must not settle while it is put together: of what it is made is up to
        # date.
        self.settle()
        return CurrentBuffers, (), {"source": self.source, "buffers": dict(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state["buffers"])
        self.source = state["source"]


Marks = list[tuple[Tensor, int]]


def mark(layers: Iterable[SyncNorm], names: Sequence[str]) -> Marks:
    """Note how often the layers' buffers of these names have been written so far.

    Called when a message leaves that will change them. Waits for nothing. For those who hold a
    buffer since before that and write it in place: they do not pass by `CurrentBuffers`. Of
    inference tensors nobody knows.
    """
    found = [dict.get(layer._buffers, name) for layer in layers for name in names]
    return [(b, b._version) for b in found if b is not None and not b.is_inference()]


def written(marks: Marks) -> list[Tensor]:
    """The buffers that somebody has written since."""
    return [buffer for buffer, version in marks if buffer._version != version]


class LoadedMark:
    """Told by transformers' from_pretrained, at its end, that a layer is complete.

    Its marks say what was loaded. What the checkpoint lacks is uninitialised memory. torch's own
    buffers are its concern; those of a layer's mode are not known to it and begin as in a new
    layer.
    """

    NAME = "_is_hf_initialized"

    def __get__(self, layer: SyncNorm | None, owner: type | None = None) -> Any:
        if layer is None or self.NAME not in layer.__dict__:
            raise AttributeError(self.NAME)
        return layer.__dict__[self.NAME]

    def __delete__(self, layer: SyncNorm) -> None:
        layer.__dict__.pop(self.NAME, None)

    def __set__(self, layer: SyncNorm, value: bool) -> None:
        layer.__dict__[self.NAME] = value
        tensors = dict(layer.named_buffers(recurse=False))
        own = layer.sync_mode.buffer_names
        are_marked = any(hasattr(tensor, self.NAME) for tensor in tensors.values())
        if are_marked and own and not any(hasattr(tensors[name], self.NAME) for name in own):
            layer.sync_mode.begin(layer)
