"""The steps of a model whose layers act together: delimited by its training forwards.

    forward begins   begin   the last step's messages are waited for, and a new step is begun
    layers run               each leaves the sums of its batch
    forward ends     send    what was left is sent, for all layers in one message

A forward that raises sends nothing, and the next `begin` drops what it has left. A forward that the
model calls within its own forward is part of the outer one. Within `accumulate`, or a step of a
sampler, several forwards are one step:

    block begins     begin
    forward begins   keep    what the forwards before it have left
    forward raises   undo    what it has left itself
    block ends       send    or `drop`, if it raises
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from syncnorm.recomputing import is_recomputing
from syncnorm.undocumented import (
    disable_dynamo,
    is_within_itself,
    unseen_by_selective_checkpoint,
)


class StepListener(Protocol):
    """Whoever acts for the layers of a model together: it is told where steps begin and end."""

    @property
    def layers(self) -> Mapping[str, nn.Module]:
        """The layers that have it, by name."""
        ...

    def trains(self) -> bool:
        """True if a forward of the model that begins now trains any of them."""
        ...

    def begin(self) -> None:
        """Start a step; drop what an unfinished one has left. Every worker must call."""
        ...

    def send(self) -> None:
        """Send what the step has collected. Every worker must call."""
        ...

    def drop(self) -> None:
        """Forget what the step has collected and not sent."""
        ...

    def keep(self) -> None:
        """Remember what the step has collected so far."""
        ...

    def undo(self) -> None:
        """Forget what the step has collected since `keep`."""
        ...


class Steps:
    """Tells a listener where the steps of its model begin and end."""

    is_open: bool

    def __init__(self, listener: StepListener) -> None:
        self.listener = listener
        self.is_held = False
        """True if forwards are being accumulated into one step."""
        self.is_open = False
        """True if a training forward of the model is running."""
        self._handled: BaseException | None = None
        self._has_inner = False
        """True if the model has called itself in the running forward."""

    def attach(self, model: nn.Module) -> None:
        """Have the forwards of `model` delimit the steps."""
        model.register_forward_pre_hook(self._before, prepend=True)
        model.register_forward_hook(self._after, always_call=True)

    def _before(self, model: nn.Module, args: object) -> None:
        trains = self.listener.trains()
        if trains or self.is_open:
            self._delimit(model, begins=trains)

    def _after(self, model: nn.Module, args: object, output: object) -> None:
        if self.is_open:
            self._delimit(model, begins=None)

    @disable_dynamo
    def begin_block(self) -> None:
        """Begin a step that lasts longer than a forward. Every worker must call."""
        self.listener.begin()

    @disable_dynamo
    def end_block(self) -> None:
        """Send what such a step has collected. Every worker must call."""
        self.listener.send()

    @disable_dynamo
    @unseen_by_selective_checkpoint
    def _delimit(self, model: nn.Module, begins: bool | None) -> None:
        """Begin a forward, of training or not, or end it (None). A repeated one is no step."""
        if is_recomputing() or self._is_inner(model, begins):
            return
        self.is_open = self._has_inner = False
        if begins:
            if self.is_held:
                self.listener.keep()
            else:
                self.listener.begin()
            self.is_open, self._handled = True, sys.exc_info()[1]
        elif begins is None:
            # Called for a forward that raised, too, while its exception is being handled.
            has_raised = sys.exc_info()[1] is not self._handled
            self._handled = None
            if has_raised and self.is_held:
                self.listener.undo()
            elif not has_raised and not self.is_held:
                self.listener.send()

    def _is_inner(self, model: nn.Module, begins: bool | None) -> bool:
        """True if the forward that begins or ends is one that the running one has made."""
        may_be = self.is_open and (begins is not None or self._has_inner)
        if not (may_be and is_within_itself(model)):
            return False
        self._has_inner = True
        return True

    def __getstate__(self) -> dict[str, object]:
        # A copy made within `accumulate`, or within a forward, is not part of it.
        none = {"is_held": False, "is_open": False, "_handled": None, "_has_inner": False}
        return {**self.__dict__, **none}


def delimited_by(module: nn.Module) -> set[Steps]:
    """The steps that forwards of `module`, or of a part of it, delimit."""
    return {steps for _, _, _, steps in _hooks(module)}


def remove_deserted(module: nn.Module) -> None:
    """Remove the hooks of steps that no layer takes part in any more."""
    for m, hooks, key, steps in _hooks(module):
        if not steps.listener.layers:
            del hooks[key]
            m._forward_hooks_always_called.pop(key, None)


def _hooks(module: nn.Module) -> list[tuple[nn.Module, dict[int, Any], int, Steps]]:
    """Every hook of steps: its module, where it is kept there, its key and the steps."""
    found: list[tuple[nn.Module, dict[int, Any], int, Steps]] = []
    for m in module.modules():
        kept: list[dict[int, Any]] = [m._forward_pre_hooks, m._forward_hooks]
        for hooks in kept:
            for key, hook in hooks.items():
                steps = getattr(hook, "__self__", None)
                if isinstance(steps, Steps):
                    found.append((m, hooks, key, steps))
    return found
