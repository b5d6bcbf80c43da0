"""Less time or memory for the same step: activation checkpointing, memory format, TF32."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from syncnorm.train.config.section import check_finds
from syncnorm.train.config.train import TrainSection
from syncnorm.train.data.batches import map_members


def make_efficient(model: nn.Module, train: TrainSection) -> None:
    """Change, in place, how a model is computed, as the configuration asks for it.

    Raises:
        ConfigError: an expression of `train.recompute` finds no module.
    """
    _recompute(model, train.recompute)
    if train.channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        model.register_forward_pre_hook(_order_inputs, with_kwargs=True)


def set_tf32(wanted: bool | None) -> None:
    """Let CUDA compute products and convolutions of float32 in TF32, or not; None: as it is."""
    if wanted is not None:
        # Not by `cudnn.fp32_precision`: torch 2.11's says nothing to convolutions, and torch's own
        # older code, such as `cudnn.flags`, cannot read what is set so.
        cudnn: Any = torch.backends.cudnn
        torch.backends.cuda.matmul.allow_tf32 = cudnn.allow_tf32 = wanted
        # Else what is turned off is as a program has set `torch.backends.fp32_precision`.
        for part in (cudnn.conv, cudnn.rnn):
            part.fp32_precision = "tf32" if wanted else "ieee"


def _recompute(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let modules keep their inputs alone, and repeat their forward in the backward pass.

    They are, of those whose name an expression finds, the outermost. Results have the same bits;
    names and state dict stay.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    check_finds("train.recompute", patterns, modules, "a module")
    found: list[str] = []
    for name, module in modules.items():  # a module comes before those within it
        is_within = any(name.startswith(f"{outer}.") for outer in found)
        if not is_within and any(re.search(pattern, name) for pattern in patterns):
            found.append(name)
            # A copy of the module, such as that of a moving average, has its own bound method.
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def _order_inputs(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _with_channels_last(args), _with_channels_last(kwargs)


def _with_channels_last(batch: Any) -> Any:
    """Order the images (N, C, H, W) of a batch with channels last."""
    if isinstance(batch, Tensor):
        is_images = batch.ndim == 4 and batch.is_floating_point()
        return batch.contiguous(memory_format=torch.channels_last) if is_images else batch
    return map_members(batch, _with_channels_last)
