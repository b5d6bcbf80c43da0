"""Objects that a program hands over to the workers of its run: data, model, task, callbacks."""

import copy
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import nn

from syncnorm.errors import ConfigError, in_one_line
from syncnorm.train.callbacks import Callback
from syncnorm.train.config.callables import GIVEN, give
from syncnorm.train.config.section import REFERENCE


class Given:
    """Callables by the name that a configuration has for them, and callbacks.

    A worker that is forked inherits them. To one that is spawned they are sent, classes and
    functions of a notebook or a script included; it unpacks them in `give`.

    Args:
        callables: such as `{"given:model": Net}`.
        callbacks: of the run.
    """

    def __init__(
        self,
        callables: Mapping[str, Callable[..., Any]] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self._parts: dict[str, Any] = {**(callables or {}), "callbacks": tuple(callbacks)}
        self._is_packed = False

    @property
    def is_empty(self) -> bool:
        """True if there are none of either."""
        return self._parts == {"callbacks": ()}

    def give(self) -> tuple[Callback, ...]:
        """Hand the callables over to this process, and return the callbacks."""
        parts = dict(self._parts)
        if self._is_packed:
            import cloudpickle

            parts = {name: cloudpickle.loads(part) for name, part in parts.items()}
        callbacks = parts.pop("callbacks")
        give(parts)
        return callbacks

    def __getstate__(self) -> dict[str, Any]:
        if self._is_packed or self.is_empty:
            return dict(self.__dict__)
        return {
            "_parts": {name: _pack(name, part) for name, part in self._parts.items()},
            "_is_packed": True,
        }


def _pack(name: str, part: Any) -> bytes:
    import cloudpickle

    class Pickler(cloudpickle.Pickler):
        # Code that says `self.classes` seems to cloudpickle to mean torch.classes, whose type it
        # does not know for a module's.
        dispatch_table: ClassVar[Mapping[type, Callable[[Any], Any]]] = {
            **cloudpickle.Pickler.dispatch_table,
            **{type(each): _by_name for each in (torch.classes, torch.ops)},
        }

    packed = io.BytesIO()
    try:
        Pickler(packed).dump(part)
        return packed.getvalue()
    except Exception as error:  # an object may raise anything
        reason = in_one_line(error)
        raise ConfigError(
            f"{name.removeprefix(f'{GIVEN}:')} cannot be sent to the workers: {reason}. Give a "
            "function that makes it."
        ) from None


def _by_name(module: ModuleType) -> tuple[Callable[[str], ModuleType], tuple[str]]:
    return import_module, (module.__name__,)


def name_of(what: str, given: Any) -> str:
    """Name an object as a configuration does: where it can be imported from, or `given:WHAT`."""
    module, name = getattr(given, "__module__", None), getattr(given, "__qualname__", "")
    reference = f"{module}:{name}"
    found = getattr(sys.modules.get(str(module)), name, None)
    return reference if REFERENCE.fullmatch(reference) and found is given else f"{GIVEN}:{what}"


class Constant:
    """A callable that returns an object: of a network, a copy, so that each run has its own.

    Args:
        value: the object.
    """

    def __init__(self, value: Any) -> None:
        self._value = value

    def __call__(self, *_: Any) -> Any:
        """Return the object."""
        return copy.deepcopy(self._value) if isinstance(self._value, nn.Module) else self._value
