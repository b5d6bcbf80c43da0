"""The Triton kernels on CPU tensors, in Triton's interpreter. Needs Triton."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction, mangle_type

from syncnorm.maths.kernels.triton import launch

PACKAGE = "syncnorm.maths.kernels.triton"


@contextmanager
def interpreted() -> Iterator[None]:
    """Run the kernels in the interpreter within the block.

    Functions are given to the interpreter where they are decorated, so the modules are imported
    anew, and those of Triton's own library are replaced. What else uses Triton in this process,
    such as torch.compile, finds all as it was after the block.
    """
    names = [f"{PACKAGE}.{name}" for name in ("tiles", "channels", "device")]
    compiled = {name: sys.modules.pop(name) for name in names}
    try:
        with knobs.runtime.scope():  # else it stays in the environment
            knobs.runtime.interpret = True
            channels, device = (importlib.import_module(name) for name in names[1:])
    finally:
        sys.modules.update(compiled)
    with (
        interpreted_library(),
        patch.object(launch, "channels", channels),
        patch.object(launch, "device", device),
    ):
        yield


@contextmanager
def interpreted_library() -> Iterator[None]:
    """Replace the functions of Triton's own library within the block."""
    # At its first call it imports a part of Triton that would not stand the replacements.
    mangle_type(torch.zeros(1))
    of_core = tl.standard.sum.fn
    with ExitStack() as stack:
        for place in (tl, tl.standard, tl.tensor):
            for name, value in list(vars(place).items()):
                # Functions that combine two values are known to the interpreter by their identity.
                if isinstance(value, JITFunction) and not name.startswith("_"):
                    replaced = interpreter.InterpretedFunction(value.fn)
                    stack.enter_context(patch.object(place, name, replaced))
        # Once for the modules that these two see, rather than at each call of a function, which
        # would take most of the time and not be undone.
        for fn in (interpreted_library.__wrapped__, of_core):
            stack.callback(interpreter._patch_lang(fn).restore)
        nothing = patch.object(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope())
        stack.enter_context(nothing)
        yield
