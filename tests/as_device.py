"""The course that a GPU's tensors take through the layers, taken by tensors of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from syncnorm import device
from syncnorm.comm import shared
from syncnorm.maths import kernels
from syncnorm.maths.kernels import portable


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
    """function(*args) within `as_device(name)` and with CUDA's operators; for ranks of a pool."""
    with as_device(name), as_on_cuda():
        return function(*args)


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Have torch's batch norm read and write what it does on CUDA, and no CPU does.

    By native/cuda/Normalization.cu: in evaluation mode the forward operator writes the statistics
    that it normalises by, and the backward one takes those that it is given, in either mode.
    """
    with (
        mock.patch.object(portable, "_forward_operator", batch_norm),
        mock.patch.object(portable, "_backward_operator", _batch_norm_backward),
    ):
        yield


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    is_training: bool,
    momentum: float,
    eps: float,
    *,
    out: Tensor,
    save_mean: Tensor,
    save_invstd: Tensor,
) -> None:
    assert not is_training
    save_mean.copy_(running_mean)
    save_invstd.copy_(torch.rsqrt(running_var + eps))
    mean, invstd, weight, bias = (
        c.view(-1, *[1] * (x.ndim - 2)) for c in (save_mean, save_invstd, weight, bias)
    )
    out.copy_((x.to(mean.dtype) - mean) * invstd * weight + bias)


def _batch_norm_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    running_mean: None,
    running_var: None,
    save_mean: Tensor,
    save_invstd: Tensor,
    is_training: bool,
    eps: float,
    wanted: list[bool],
) -> tuple[None, Tensor, Tensor]:
    assert (is_training, wanted) == (True, [False, True, True])
    over = [0, *range(2, x.ndim)]
    g, x = g.to(weight.dtype), x.to(weight.dtype)
    centred = x - save_mean.view(-1, *[1] * (x.ndim - 2))
    return None, (g * centred).sum(over) * save_invstd, g.sum(over)
