"""Fuzzed sequences of calls: values that can be printed, drawn by a seed, and shrunk."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

WORKERS = 3
CALLS = 20
_ANY = ("float32", "float64", "bfloat16")
_WIDE, _NARROW = ("float64",), ("float32", "bfloat16")

Choose = Callable[[Sequence[Any]], Any]
"""One of the options: `random.choice`."""


@dataclass(frozen=True)
class Call:
    """One call of the layer, and what comes before and after it. Triples go by worker."""

    mode: str = "train"
    """"train", "eval", or "frozen": a training forward within `frozen_statistics`."""
    sizes: tuple[int, ...] = (2, 2, 2)
    masks: tuple[str, ...] = ("none", "none", "none")
    """"none", "weights" (0, 1 or 2), "bool" or "zero"."""
    dtype: str = "float32"
    layout: str = "contiguous"
    """"contiguous", "channels_last" or "rows", which is (N, C)."""
    needs_grad: tuple[bool, ...] = (True, True, True)
    checkpoint: str = "no"
    """"no", "reentrant" or "non-reentrant"."""
    in_block: bool = False
    """Neighbouring calls of which this is true are in one `accumulate` block."""
    zero_grad: bool = True
    """True if gradients are zeroed before the call."""
    backward: str = "together"
    """The order of the pending backward passes: "together", "one by one" (last first) or "later".
    """
    is_again: bool = False
    """True if the batch is that of the call before."""
    copied: bool = False
    """True if the sequence goes on with a deepcopy of the layer."""

    def __str__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Call({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"


@dataclass(frozen=True)
class Calls:
    """A layer and the calls that it gets."""

    seed: int
    """Of the data and the parameters."""
    kind: str
    """"norm" or "renorm"."""
    affine: bool
    momentum: float | None
    running_average: str
    dtype: str
    """Of parameters and buffers."""
    calls: tuple[Call, ...]

    def __str__(self) -> str:
        head = ", ".join(
            f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name != "calls"
        )
        return "\n".join([f"Calls({head}, calls=(", *(f"    {call}," for call in self.calls), "))"])


def draw_calls(seed: int) -> Calls:
    """A layer and calls of it, the same for the same seed."""
    choose = random.Random(seed).choice
    dtypes = choose((_NARROW, _WIDE, _ANY))
    dtype = "float64" if dtypes == _WIDE else choose(("float32", "float64"))
    calls: list[Call] = []
    for _ in range(CALLS):
        calls.append(draw_call(choose, dtypes, dtype, calls[-1] if calls else None))
    return Calls(
        seed=seed,
        kind=choose(("norm", "renorm")),
        affine=choose((True, True, False)),
        momentum=choose((0.1, None)),
        running_average=choose(("std", "var")),
        dtype=dtype,
        calls=tuple(calls),
    )


def draw_call(choose: Choose, dtypes: Sequence[str], layer_dtype: str, before: Call | None) -> Call:
    mode = choose(("train", "train", "train", "eval", "frozen"))
    checkpoint = "no" if mode == "eval" else choose(("no", "no", "non-reentrant", "reentrant"))
    # In evaluation the layer takes what `F.batch_norm` takes.
    allowed = [
        d for d in dtypes if mode != "eval" or (d == "float64") == (layer_dtype == "float64")
    ]
    # A re-entrant checkpoint whose input needs no gradient has no backward pass at all; torch says
    # so.
    grads = (True,) if checkpoint == "reentrant" else (True, True, False)
    masks = choose((("none",), ("none", "none", "weights", "bool", "zero"), ("zero",)))
    drawn = Call(
        mode=mode,
        sizes=tuple(choose((2, 1, 0, 3)) for _ in range(WORKERS)),
        masks=tuple(choose(masks) for _ in range(WORKERS)),
        dtype=choose(allowed or [layer_dtype]),
        layout=choose(("contiguous", "channels_last", "rows")),
        needs_grad=tuple(choose(grads) for _ in range(WORKERS)),
        checkpoint=checkpoint,
        in_block=choose((False, False, True)),
        zero_grad=choose((True, False)),
        backward=choose(("together", "later", "later", "one by one")),
        copied=choose((False, False, False, False, False, True)),
    )
    if before is None or mode == "eval" or not choose((False, False, False, True)):
        return drawn
    return replace(
        drawn,
        is_again=True,
        sizes=before.sizes,
        masks=before.masks,
        dtype=before.dtype,
        layout=before.layout,
    )


def traits(call: Call) -> list[str]:
    """The kinds of call that this one is, for counting."""
    return [
        call.mode,
        call.dtype,
        call.layout,
        "no worker has samples"
        if not any(call.sizes)
        else "a worker without samples"
        if 0 in call.sizes
        else "",
        "masks" if set(call.masks) != {"none"} else "",
        "masks on some workers only" if len({m == "none" for m in call.masks}) == 2 else "",
        "all weights zero" if set(call.masks) == {"zero"} else "",
        "inputs differ in requires_grad" if len(set(call.needs_grad)) == 2 else "",
        f"checkpoint, {call.checkpoint}" if call.checkpoint != "no" else "",
        "in an accumulate block" if call.in_block else "",
        "gradients kept from before" if not call.zero_grad else "",
        "backward left for later" if call.backward == "later" and call.mode != "eval" else "",
        "backward one by one" if call.backward == "one by one" else "",
        "the batch before again" if call.is_again else "",
        "deepcopy" if call.copied else "",
    ]
