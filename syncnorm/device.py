"""The one fact about a tensor's device that decides a course of action."""

from __future__ import annotations

from torch import Tensor

_HOSTS = ("cpu",)


def is_host(t: Tensor) -> bool:
    """True if the numbers of t may be looked at: elsewhere the host would wait for the device."""
    return t.is_cpu and "cpu" in _HOSTS
