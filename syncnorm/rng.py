"""The random numbers that a program shares: torch's, Python's and numpy's, together."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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
