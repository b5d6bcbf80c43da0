"""The scale of the loss in a training with float16, whose range gradients would leave."""

import math
from typing import Any

import torch
from torch import nn

from syncnorm.train.workers import Workers

# Of the loss of the whole step. A worker's own scale is so many times smaller as DDP's average over
# the workers makes its gradients greater.
_FIRST_SCALE = 2.0**16


def make_scaler(autocast: str | None, workers: Workers) -> torch.amp.GradScaler:
    """Make torch's scaler; it does nothing unless `autocast` is float16."""
    return torch.amp.GradScaler(
        workers.device.type,
        init_scale=_FIRST_SCALE / workers.world_size,
        enabled=autocast == "float16",
    )


def unscale(
    scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, is_finite: bool, world_size: int
) -> tuple[bool, bool]:
    """Divide the gradients by the scale, and choose the next one.

    The host waits for the backward pass. The result is alike on all workers, as the gradients are.

    Args:
        scaler: that has scaled the loss.
        optimizer: of the parameters.
        is_finite: True if the loss is.
        world_size: number of workers.

    Returns:
        True if the scaled gradients alone have left float16's range; True if nothing else has.
    """
    scale = scaler.get_scale()
    scaler.unscale_(optimizer)
    scaler.update()
    if not is_finite or scaler.get_scale() >= scale:
        return False, is_finite
    # Where the scale has made nothing greater, it is the gradient itself.
    is_overflow = scale * world_size > 1
    return is_overflow, is_overflow


def scaler_state(scaler: torch.amp.GradScaler, world_size: int) -> dict[str, Any]:
    """Describe the state of a scaler, for any number of workers."""
    state = scaler.state_dict()
    scale = state["scale"] * world_size
    # A power of 2, as the first one is: its share of 3 workers is rounded.
    return state | {"scale": 2.0 ** round(math.log2(scale)) if scale > 0 else scale}


def rescale_gradient_averages(model: nn.Module, factor: float) -> None:
    """Multiply, in place, what layers of sync="lagged" keep of gradients, which have the loss's scale."""
    for name, average in model.named_buffers():
        if name.rpartition(".")[2] == "lagged_gradient":
            average.mul_(factor)


def load_scaler(scaler: torch.amp.GradScaler, state: dict[str, Any], world_size: int) -> None:
    """Load a state of `scaler_state`, perhaps of another number of workers."""
    scaler.load_state_dict(state | {"scale": state["scale"] / world_size})
