"""The one fact about a tensor's device that decides a course of action, and a module's tensor."""

from __future__ import annotations

from torch import Tensor, nn

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
