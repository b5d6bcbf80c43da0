"""Each module's own mode, training or evaluation: begun with, left for a while, and put back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn


def begin_training(model: nn.Module) -> bool:
    """Put a model that is wholly in evaluation mode into training mode; leave what is frozen in any
    other as it is.

    A module's own `train` has its say: what it keeps in evaluation mode stays there.

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
def evaluating(model: nn.Module) -> Iterator[None]:
    """All of `model` in evaluation mode within the block; afterwards each module has the mode it
    had.
    """
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        put_modes(before)


def put_modes(modes: Mapping[nn.Module, bool]) -> None:
    """Give each module its mode.

    Args:
        modes: by module, parents before their children, as `Module.modules` has them.
    """
    for module, mode in modes.items():
        if module.training != mode:
            # Not the flag alone: a module's own `train` may do more, such as take merged weights
            # apart.
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
