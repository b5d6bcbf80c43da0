"""The random generators that a data set and its transforms keep for themselves."""

import functools
import inspect
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import BuiltinMethodType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

# Longer containers hold samples, paths or labels, not transforms.
_MOST_MEMBERS = 256


def generators_in(root: Any) -> list[Any]:
    """Find the objects below `root` that draw from a generator of their own, in a fixed order.

    Such an object is a generator of torch, of numpy or of Python, or has a method
    `set_random_state(seed)`, as MONAI's have. Attributes, slots, short containers, partial
    functions, bound methods, and closures and defaults of functions are looked through. What a
    module or a class holds is not seen.
    """
    found, seen, stack = [], set[int](), [root]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if _seeder(value) is not None:
            found.append(value)
        else:
            stack.extend(reversed(list(_members(value))))
    return found


def seed_generators(found: Iterable[Any], seed: int) -> None:
    """Seed what `generators_in` has found: each by a number of its own, less than 2**32."""
    for number, value in enumerate(found, start=1):
        seeder = _seeder(value)
        assert seeder is not None
        seeder((seed + number) % 2**32)


def _seeder(value: Any) -> Callable[[int], Any] | None:
    """Find what seeds an object; None if it has no generator."""
    if isinstance(value, type | ModuleType):
        return None
    if isinstance(value, torch.Generator):
        return value.manual_seed
    if isinstance(value, random.Random):
        return value.seed
    if isinstance(value, np.random.RandomState):
        return value.seed
    if isinstance(value, np.random.Generator):
        return functools.partial(_seed_bits, value.bit_generator)
    if isinstance(value, np.random.BitGenerator):
        return functools.partial(_seed_bits, value)
    # MONAI's are shared by all of a class until each is set. By its class, as an object may answer to
    # any name; albumentations has a method of this name without a seed, and generators as above.
    method = getattr(type(value), "set_random_state", None)
    if callable(method) and "seed" in inspect.signature(method).parameters:
        return value.set_random_state
    return None


def _seed_bits(bits: Any, seed: int) -> None:
    bits.state = type(bits)(seed).state


def _members(value: Any) -> Iterator[Any]:
    if isinstance(value, str | bytes | torch.Tensor | type | ModuleType):
        return
    if isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not filled yet
                continue
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        yield from value.__dict__.values()
    elif isinstance(value, MethodType | BuiltinMethodType):
        yield value.__self__
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, dict):  # another mapping may read a file for each value
        if len(value) <= _MOST_MEMBERS:
            yield from value.values()
    elif isinstance(value, list | tuple | deque):
        if len(value) <= _MOST_MEMBERS:
            yield from value
    else:
        with suppress(AttributeError):  # it has slots alone
            # Past what an object answers of its own.
            yield from object.__getattribute__(value, "__dict__").values()
        for kind in type(value).__mro__:
            for slot in vars(kind).values():
                if isinstance(slot, MemberDescriptorType):
                    with suppress(AttributeError):  # not filled yet
                        yield slot.__get__(value)
