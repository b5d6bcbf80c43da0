"""The native library: kernels for CPUs, and messages over shared memory. Never required.

Plain C behind pointers and sizes, so that one build serves every version of torch and Python. It is
built with the package where there is a C compiler (see `syncnorm.native.build`). Without it, and
with `SYNCNORM_NATIVE=0` in the environment, operators of torch and messages of gloo do the work.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from syncnorm.native import build

FOLDER = build.HERE
"""The folder of the libraries."""
# By torch's own choice among instruction sets, which ATEN_CPU_CAPABILITY changes.
_LEVELS = {"AVX512": 0, "AVX2": 1}


class Native(NamedTuple):
    """The library, or why there is none."""

    library: ctypes.CDLL | None
    detail: str
    """The level of the library's instruction set; or why it is not used."""


@cache
def load() -> Native:
    """Load the library of the best level that this processor has."""
    if os.environ.get("SYNCNORM_NATIVE", "1") == "0":
        return Native(None, "turned off by SYNCNORM_NATIVE=0")
    names = [*build.levels()]
    best = _LEVELS.get(torch.backends.cpu.get_cpu_capability(), len(names) - 1)
    for level in names[min(best, len(names) - 1) :]:
        path = build.library_path(FOLDER, level)
        if path.exists():
            return _open(path, level)
    return Native(None, f"not built: {FOLDER} has none; an installation makes it with a C compiler")


def _open(path: Path, level: str) -> Native:
    try:
        library = ctypes.CDLL(str(path))
        library.syncnorm_digest.restype = ctypes.c_char_p
        built_from = library.syncnorm_digest().decode()
    except (OSError, AttributeError) as error:
        return Native(None, f"{path.name} cannot be loaded: {error}")
    if built_from != build.digest():
        return Native(None, f"{path.name} is older than its sources: install the package again")
    return Native(library, level)


def functions(prefix: str, signatures: Mapping[str, Sequence[Any]]) -> SimpleNamespace | None:
    """The library's functions `prefix` + name, by name; None where it is not used.

    Args:
        prefix: of their names in C.
        signatures: the type of the result and those of the arguments, by name.
    """
    if (found := library()) is None:
        return None
    bound = SimpleNamespace()
    for name, (result, *arguments) in signatures.items():
        function = getattr(found, prefix + name)
        function.restype, function.argtypes = result, arguments
        setattr(bound, name, function)
    return bound


def library() -> ctypes.CDLL | None:
    """The library; None where it is not used."""
    return load().library
