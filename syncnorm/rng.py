"""The random numbers that a program shares: torch's, Python's and numpy's, together."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


def seed_all(seed: int, *, devices: bool = True) -> None:
    """Seed them, those of numpy where something has imported it.

    Args:
        seed: from 0 to 2**64 - 1.
        devices: False to leave the devices' alone.
    """
    # Not torch.manual_seed: of each kind of device that is not there it keeps the seed and the stack
    # of the call, in case that it comes, which takes as long as several layers.
    torch.default_generator.manual_seed(seed)
    if devices and torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        # Its generator is Python's: of the same seed it would draw the same.
        other = seed ^ 1
        with suppress(TypeError):  # a program has chosen a generator that cannot be seeded so
            numpy.random.seed([other % 2**32, other >> 32])


@contextmanager
def kept(*, devices: bool = True) -> Iterator[None]:
    """Give the program back, after the block, the numbers that it would have drawn.

    Args:
        devices: False where the block draws none on a device.
    """
    numpy = sys.modules.get("numpy")
    of_numpy = None if numpy is None else numpy.random.get_state()
    of_python = random.getstate()
    there = devices and torch.cuda.is_initialized()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count() if there else 0)):
            yield
    finally:
        random.setstate(of_python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)


def state() -> dict[str, Any]:
    """Return where they stand, for `load_state`: tensors and plain values, to be saved.

    Of the devices' those of the present one; of numpy's where something has imported it.
    """
    version, numbers, gauss = random.getstate()
    found: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": [version, list(numbers), gauss],
    }
    numpy = sys.modules.get("numpy")
    of_numpy = None if numpy is None else numpy.random.get_state()
    if isinstance(of_numpy, tuple):  # of a program that has chosen another generator it is a dict
        name, keys, *rest = of_numpy
        found["numpy"] = [name, keys.tolist(), *rest]
    return found


def load_state(found: dict[str, Any]) -> None:
    """Have them go on from where they stood."""
    torch.set_rng_state(found["torch"])
    if found["cuda"] is not None:
        torch.cuda.set_rng_state(found["cuda"])
    version, numbers, gauss = found["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "numpy" in found:
        import numpy as np

        name, numbers, *rest = found["numpy"]
        np.random.set_state((name, np.array(numbers, dtype=np.uint32), *rest))
