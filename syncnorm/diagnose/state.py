"""The state of a model, put back after whatever a measure has done to it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from syncnorm import rng
from syncnorm.family.layer import FamilyLayer, Pooling
from syncnorm.model.frozen import frozen_statistics
from syncnorm.model.modes import evaluating, kept, put_modes
from syncnorm.module import SyncNorm


@contextmanager
def in_training(
    model: nn.Module, frozen: Collection[str] = (), *, with_noise: bool = False
) -> Iterator[None]:
    """Have `model` normalise by batches within the block; nothing that it keeps moves.

    Dropout and its like are in evaluation mode unless asked for: their noise depends on how samples
    are shared out.

    Args:
        model: whose modules' modes and buffers are as before afterwards, also after an error.
        frozen: names of modules that stay in evaluation mode.
        with_noise: True to leave dropout on.
    """
    with evaluating(model), ExitStack() as stack:
        off = {name for name, m in model.named_modules() if is_noise(m) and not with_noise}
        stays = {*frozen, *off}
        put_modes({m: name not in stays for name, m in model.named_modules()})
        with warnings.catch_warnings():
            # Other layers' statistics are put back below.
            warnings.simplefilter("ignore", UserWarning)
            if any(isinstance(m, SyncNorm | Pooling) for m in model.modules()):
                stack.enter_context(frozen_statistics(model))
        stack.enter_context(kept(dict(model.named_buffers())))
        for m in model.modules():
            if isinstance(m, FamilyLayer):
                m.looks_ahead = True
                stack.callback(delattr, m, "looks_ahead")
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw the same random numbers in each block of this seed; the program's go on as before."""
    with rng.kept():
        rng.seed_all(seed)
        yield


def is_noise(module: nn.Module) -> bool:
    """True for dropout and its like: DropPath, StochasticDepth."""
    kind = type(module).__name__.lower()
    return isinstance(module, _DropoutNd) or "droppath" in kind or "stochasticdepth" in kind
