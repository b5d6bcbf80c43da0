"""The devices of layers and models, and the one fact about a device that decides what is done."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

# Tests empty it: tensors of the CPU then take the course of a device's.
_HOSTS = ("cpu",)


def is_host(t: Tensor) -> bool:
    """True if the numbers of t may be looked at: elsewhere the host would wait for the device."""
    return t.is_cpu and "cpu" in _HOSTS


def first_tensor(module: nn.Module) -> Tensor | None:
    """The first buffer or parameter of a module's own, past what would wait for sums under way."""
    buffers = module._buffers
    # A module that torch.jit has compiled has no dict.
    own = dict.values(buffers) if isinstance(buffers, dict) else buffers.values()
    tensors = (*own, *module._parameters.values())
    return next((tensor for tensor in tensors if tensor is not None), None)


def layer_device(layer: nn.Module) -> torch.device:
    """The device of a layer's own tensors; the CPU without any. Waits for nothing."""
    first = first_tensor(layer)
    return torch.device("cpu") if first is None else first.device


def model_device(model: nn.Module) -> torch.device:
    """The device of a model's first parameter, or else buffer; the CPU without any."""
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
