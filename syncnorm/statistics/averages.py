"""What `sync="lagged"` carries from step to step: how it begins, also where a loader fills the
layer.

See `syncnorm.statistics.lagged` for what it is. A checkpoint of a batch norm has none of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from syncnorm.module import SyncNorm

AVERAGES = ("lagged_mean", "lagged_var", "lagged_gradient", "lagged_updates", "lagged_waits")


def initial(layer: SyncNorm, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """What `sync="lagged"` carries from step to step (see syncnorm.statistics.lagged), before the first
    one.
    """
    channels = layer.num_features
    wide: dict[str, Any] = {"dtype": torch.float64, "device": device}
    return {
        "lagged_mean": torch.zeros(channels, **wide),
        "lagged_var": torch.ones(channels, **wide),
        "lagged_gradient": torch.zeros(2, channels, **wide),
        "lagged_updates": torch.zeros(2, dtype=torch.int64, device=device),
        "lagged_waits": torch.ones((), dtype=torch.bool, device=device),
    }


@torch.no_grad()
def begin(layer: SyncNorm) -> None:
    """Give the averages the values that they have in a new layer."""
    for name, value in initial(layer, layer.lagged_mean.device).items():
        layer.get_buffer(name).copy_(value)


def is_brought(layer: SyncNorm, name: str, value: Tensor | None) -> bool:
    """Whether an entry of a state dict comes from outside of the layer.

    torch's distributed checkpointing completes a state dict by the model's own entries.
    """
    own = layer._buffers.get(name)
    if not isinstance(value, Tensor) or own is None or value.is_meta or own.is_meta:
        return isinstance(value, Tensor) and not value.is_meta
    return value.device != own.device or not value.is_set_to(own)


class Loaded:
    """Told by transformers' from_pretrained, at its end, that a layer is complete. Its marks say
    what was loaded.

    What the checkpoint lacks is uninitialised memory. torch's own buffers are its concern; the
    averages are not known to it and begin as in a new layer.
    """

    NAME = "_is_hf_initialized"

    def __get__(self, layer: SyncNorm | None, owner: type | None = None) -> Any:
        if layer is None or self.NAME not in layer.__dict__:
            raise AttributeError(self.NAME)
        return layer.__dict__[self.NAME]

    def __delete__(self, layer: SyncNorm) -> None:
        layer.__dict__.pop(self.NAME, None)

    def __set__(self, layer: SyncNorm, value: bool) -> None:
        layer.__dict__[self.NAME] = value
        tensors = dict(layer.named_buffers(recurse=False))
        are_marked = any(hasattr(tensor, self.NAME) for tensor in tensors.values())
        if (
            are_marked
            and layer.sync == "lagged"
            and not any(hasattr(tensors[n], self.NAME) for n in AVERAGES)
        ):
            begin(layer)
