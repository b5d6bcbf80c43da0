"""Inputs of any number of dimensions for layers that take only some.

A statistic is over all positions, so it does not matter how these are arranged. Hooks, not a
wrapper: the layer's parameters and buffers keep their names.
"""

from __future__ import annotations

import weakref
from functools import partial

from torch import Size, Tensor, nn

_shapes: weakref.WeakKeyDictionary[nn.Module, Size] = weakref.WeakKeyDictionary()
"""The shape of the input in the running call."""


def reshape(layer: nn.Module, dimensions: tuple[int, ...]) -> None:
    """Have `layer`, which takes inputs of these dimensions, take (N, C, *S) of any.

    The output has the shape of the input.
    """
    layer.register_forward_pre_hook(partial(_before, dimensions))
    layer.register_forward_hook(_after)


def _before(
    dimensions: tuple[int, ...], layer: nn.Module, args: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    x, *others = args
    _shapes[layer] = x.shape
    if x.ndim in dimensions:
        return args
    if x.ndim < dimensions[-1]:
        return x.reshape(*x.shape, *[1] * (dimensions[-1] - x.ndim)), *others
    return x.flatten(dimensions[-1] - 1), *others


def _after(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    shape = _shapes.pop(layer)
    return output if output.shape == shape else output.reshape(shape)
