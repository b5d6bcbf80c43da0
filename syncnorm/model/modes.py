"""Modes of single modules, and values of tensors: set, saved and restored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

K = TypeVar("K")


def begin_training(model: nn.Module) -> bool:
    """Put a model into training mode, except for modules that are frozen.

    Frozen are modules in evaluation mode, unless all of the model is, and modules that a `train` of
    their own keeps in evaluation mode.

    Args:
        model: as its builder left it.

    Returns:
        True if the model was wholly in evaluation mode.
    """
    before = {module: module.training for module in model.modules()}
    was_off = not any(before.values())
    model.train()
    if not was_off:
        put_modes({module: was and module.training for module, was in before.items()})
    return was_off


@contextmanager
def in_mode(model: nn.Module, is_training: bool) -> Iterator[None]:
    """Put all of `model` into a mode within the block, then restore each module's mode."""
    before = {module: module.training for module in model.modules()}
    model.train(is_training)
    try:
        yield
    finally:
        put_modes(before)


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Put all of `model` into evaluation mode within the block, then restore each module's mode."""
    return in_mode(model, is_training=False)


def put_modes(modes: Mapping[nn.Module, bool]) -> None:
    """Set the mode of each module.

    Args:
        modes: training or not, by module; parents before their children, as in `Module.modules`.
    """
    for module, mode in modes.items():
        if module.training != mode:
            # Not the flag alone: a module's own `train` may do more, such as unmerge weights.
            module.train(mode)
    for module, mode in modes.items():
        module.training = mode


def in_evaluation(model: nn.Module) -> list[str]:
    """The names of the modules that are in evaluation mode."""
    return [name for name, module in model.named_modules() if not module.training]


def put_in_evaluation(model: nn.Module, names: Iterable[str]) -> None:
    """Put the modules of these names into evaluation mode, and all others into training mode."""
    frozen = set(names)
    put_modes({module: name not in frozen for name, module in model.named_modules()})


@contextmanager
def kept(tensors: Mapping[K, Tensor]) -> Iterator[dict[K, Tensor]]:
    """Put the values of these tensors back after the block; yields copies of them."""
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        yield copies
    finally:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(copies[name])
