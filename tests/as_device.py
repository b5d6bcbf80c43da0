"""The course that a GPU's tensors take through the layers, taken by tensors of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from syncnorm import device
from syncnorm.comm import shared
from syncnorm.maths import kernels


@contextmanager
def as_device(name: str = "composed") -> Iterator[None]:
    """Have no value looked at on the host, and a device's kernels do the arithmetic.

    Args:
        name: "composed", the portable ones; "triton", in Triton's interpreter.
    """
    own = getattr(kernels, name)
    with ExitStack() as stack:
        if name == "triton":
            from tests.unit.triton_interpreter import interpreted

            stack.enter_context(interpreted())
        stack.enter_context(mock.patch.object(device, "_HOSTS", ()))
        stack.enter_context(mock.patch.object(kernels.native, "_types", return_value=()))
        stack.enter_context(mock.patch.object(shared, "segment_of", return_value=None))
        stack.enter_context(mock.patch.object(kernels, "_preferred", return_value=own))
        yield


def call_as_device(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) within `as_device(name)`; for ranks of a pool."""
    with as_device(name):
        return function(*args)
