"""A model called with a batch as a loader gives it, and the shapes that its layers get."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from syncnorm import checks, tracing
from syncnorm.errors import InputError
from syncnorm.family.layer import Pooling
from syncnorm.module import SyncNorm
from syncnorm.statistics.batch import LocalSource

Shape = tuple[int, ...]


def call(model: nn.Module, batch: Any, argument: str) -> None:
    """Call the model with a batch.

    Args:
        batch: the argument, a mapping of keyword arguments, or a tuple or list. Of the latter the
            model gets as many elements as it requires, and at least the first.
        argument: the name of `batch` in an error.

    Raises:
        InputError: the model does not take these arguments.
    """
    signature = inspect.signature(_innermost(model).forward)
    args, kwargs = (), {}
    if isinstance(batch, Mapping):
        kwargs = dict(batch)
    elif isinstance(batch, tuple | list):
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        required = [
            p for p in signature.parameters.values() if p.kind in kinds and p.default is p.empty
        ]
        args = tuple(batch[: max(1, len(required))])
    else:
        args = (batch,)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        names = ", ".join(signature.parameters)
        raise InputError(
            f"`{argument}` must hold the arguments of {type(model).__name__}.forward, {names}, got "
            f"{type(batch).__name__} ({error}). Give a tensor, a tuple with an element for each, "
            "or a mapping by name."
        ) from None
    model(*args, **kwargs)


def _innermost(model: nn.Module) -> nn.Module:
    """The model that wrappers of torch's pass their arguments to."""
    while True:
        if isinstance(model, nn.DataParallel | DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:  # of torch.compile
            model = model.get_submodule("_orig_mod")
        else:
            return model


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what torch.compile has compiled as it was written.

    Compiled code would not call hooks that came later, or would be compiled again with them.
    """
    is_compiled = "torch._dynamo" in sys.modules
    with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
        yield


def check_batches(batches: object) -> None:
    """Refuse a single batch in the place of several: its samples would be taken for batches.

    Raises:
        InputError: it is a tensor or a mapping.
    """
    if isinstance(batches, Tensor | Mapping):
        raise InputError(
            f"`batches` must be an iterable of batches, got one {type(batches).__name__}. Give a "
            "list of it."
        )


def check_not_lazy(model: nn.Module) -> None:
    """Raise InputError if a parameter or a buffer has no shape yet."""
    lazy = [name for name, p in (*model.named_parameters(), *model.named_buffers()) if is_lazy(p)]
    if lazy:
        raise InputError(
            f"`model` must have its parameters, got lazy ones: {', '.join(lazy)}. Run it once "
            "before."
        )


def record_shapes(model: nn.Module, sample: Any) -> list[tuple[nn.Module, Shape]]:
    """The batch norms and dropouts that the sample passes, in order, with their inputs' shapes.

    The sample passes in evaluation mode without gradients; the model stays as it is.

    Raises:
        InputError: the model has lazy parameters, or does not take the sample.
    """
    check_not_lazy(model)
    seen: list[tuple[nn.Module, Shape]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((module, tuple(checks.input_of(args, kwargs).shape)))

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(evaluating_untouched(model))
        for module in model.modules():
            if isinstance(module, _BatchNorm | _DropoutNd | Pooling):
                stack.callback(module.register_forward_pre_hook(record, with_kwargs=True).remove)
        call(model, sample, "sample")
    return seen


@contextmanager
def evaluating_untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; modes, buffers, pending updates and random state are restored at the end."""
    modes = {m: m.training for m in model.modules()}
    family = {m: m.sync for m in modes if isinstance(m, Pooling)}
    for layer in family:
        layer.settle()
    buffers = [
        (m, name, b, b.clone()) for m in modes for name, b in m._buffers.items() if b is not None
    ]
    # An evaluation forward would apply pending updates, and so would `eval()`.
    sources = {m: m.statistics for m in modes if isinstance(m, SyncNorm)}
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    with torch.random.fork_rng([d for d in devices if d.index is not None]):
        try:
            for module in modes:
                module.training = False
            for layer in sources:
                layer.statistics = LocalSource()
            for layer in family:
                layer.sync = "none"
            yield
        finally:
            for layer, sync in family.items():
                layer.sync = sync
            for layer, source in sources.items():
                layer.statistics = source
            for module, mode in modes.items():
                module.training = mode
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                # Only where it changed: a write would invalidate what a later backward pass needs.
                if not tracing.is_fake(module) and not torch.equal(buffer, value):
                    buffer.copy_(value)
