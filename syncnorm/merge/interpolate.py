"""The straight line between two networks."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm.errors import InputError


@torch.no_grad()
def interpolate(a: nn.Module, b: nn.Module, alpha: float = 0.5) -> nn.Module:
    """Mix two networks of one architecture, parameter by parameter and buffer by buffer.

        theta = (1 - alpha) theta_a + alpha theta_b

    Running statistics are mixed, too, but they are not those of the mixed network: see `repair` and
    `syncnorm.recalibrate`. Counters, and whatever else holds no fractions, are those of `a`.

    *Collectives*: none.

    Args:
        a: stays as it is.
        b: stays as it is.
        alpha: share of `b`, in [0, 1].

    Returns:
        A new network.

    Raises:
        InputError: `alpha` is out of range, or the networks differ in architecture.

    Example:
        >>> a, b = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> _ = a.weight.data.fill_(1.0), b.weight.data.fill_(3.0)
        >>> interpolate(a, b, 0.25).weight.item()
        1.5
    """
    check_alpha(alpha)
    a, b = bare(a), bare(b)
    check_alike(a, b)
    mixed = copy.deepcopy(a)
    others = tensors(b)
    values = {
        name: torch.lerp(each.double(), others[name].to(each.device).double(), alpha).to(each.dtype)
        for name, each in tensors(a).items()
        if each.is_floating_point()
    }
    mixed.load_state_dict(values, strict=False)
    return mixed


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state of a network, but for what modules keep besides tensors (`get_extra_state`)."""
    return {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def check_alpha(alpha: float) -> None:
    """Refuse what is no share.

    Raises:
        InputError: `alpha` is out of range.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"`alpha` must be in [0, 1], got {alpha}. 0 is all of `a`, 1 all of `b`.")


def bare(model: nn.Module) -> nn.Module:
    """Unwrap DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def check_alike(*models: nn.Module) -> None:
    """Refuse networks whose states have other names or shapes.

    Raises:
        InputError: they differ.
    """
    first, *others = ({k: tuple(v.shape) for k, v in tensors(m).items()} for m in models)
    for other in others:
        differing = sorted(name for name in first | other if first.get(name) != other.get(name))
        if differing:
            name = differing[0]
            raise InputError(
                f"the networks must be of one architecture, got {name!r} with shapes "
                f"{first.get(name)} and {other.get(name)}, and {len(differing) - 1} other "
                "differences. `None` stands for a tensor that is missing."
            )
