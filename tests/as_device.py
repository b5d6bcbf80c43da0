"""The course that a GPU's tensors take through the layers, taken by tensors of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

from torch import Tensor

from syncnorm import device
from syncnorm.maths import kernels


@contextmanager
def as_device(own: ModuleType | None = None) -> Iterator[None]:
    """Have no value looked at on the host, and the device's kernels do the arithmetic.

    Args:
        own: these kernels; None: the portable ones.
    """
    chosen = kernels.of_device

    def of_device(x: Tensor) -> ModuleType | None:
        return None if chosen(x) is None else own

    with mock.patch.object(device, "_HOSTS", ()):
        if own is None:
            yield
        else:
            with mock.patch.object(kernels, "of_device", of_device):
                yield


def call_as_device(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) within `as_device`; for ranks of a pool."""
    with as_device():
        return function(*args)
