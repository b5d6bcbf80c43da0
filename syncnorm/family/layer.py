"""The base of the family's layers: what they share with BatchNorm, and with whom they pool."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from syncnorm import functional
from syncnorm.comm import groups
from syncnorm.errors import InputError
from syncnorm.family.pooled import channels, widened


class Pooling(nn.Module):
    """A layer that takes statistics of the batch with other workers.

    Args:
        sync: "batch": over the batches of all workers, which are one: each must call, with samples
            or without, forward and backward; "none": each worker's own.
        process_group: the workers; None: all of them.
    """

    def __init__(
        self, sync: Literal["batch", "none"] = "batch", process_group: groups.Spec = None
    ) -> None:
        if sync not in ("batch", "none"):
            raise InputError(f'`sync` must be "batch" or "none", got {sync!r}')
        super().__init__()
        self.sync = sync
        self.workers = groups.to_handle(process_group)
        self.label = type(self).__name__

    @property
    def group(self) -> groups.Group | None:
        """The workers that it pools with; None: nobody."""
        return None if self.sync == "none" else groups.statistics_group(self.workers)


class FamilyLayer(Pooling):
    """A layer that normalises x (N, C, *S) by statistics of the batch; abstract.

    In evaluation it uses the running statistics. Parameters and running statistics are called as
    BatchNorm's are.

    Args:
        num_features: channels C.
        eps: added to variances.
        momentum: weight of a batch in the running statistics.
        affine: True for a weight and a bias per channel.
        sync, process_group: see `Pooling`.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        *,
        sync: Literal["batch", "none"] = "batch",
        process_group: groups.Spec = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        functional.check_hyperparameters(num_features, eps, momentum)
        super().__init__(sync, process_group)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            filled = torch.full((num_features,), value, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(filled) if affine else None)
        ones = torch.ones(num_features, device=device, dtype=dtype)
        self.register_buffer("running_mean", ones - 1)
        self.register_buffer("running_var", ones)
        self.register_buffer(
            "num_batches_tracked", torch.zeros((), dtype=torch.int64, device=device)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, (N, C, *S)."""
        functional.check_input(x, self.num_features)
        wide = widened(x)
        z = self.normalize(wide) if self.training else self.evaluate(wide)
        return self.scale(z).to(x.dtype)

    @abstractmethod
    def normalize(self, x: Tensor) -> Tensor:
        """Normalise by the batch, and have the running statistics follow."""

    @abstractmethod
    def evaluate(self, x: Tensor) -> Tensor:
        """Normalise by the running statistics."""

    def scale(self, z: Tensor) -> Tensor:
        """Apply weight and bias."""
        if self.weight is not None:
            z = z * channels(self.weight, z)
        return z if self.bias is None else z + channels(self.bias, z)

    @torch.no_grad()
    def follow(self, count: Tensor, **values: Tensor) -> None:
        """Move running statistics towards a batch's; they stay where the batch is empty.

        Args:
            count: of the batch's values, ().
            values: by the names of the buffers without `running_`, (C,).
        """
        self.num_batches_tracked += (count > 0).to(torch.int64)
        for name, value in values.items():
            running = getattr(self, f"running_{name}")
            moved = torch.lerp(running.double(), value.detach(), self.momentum)
            running.copy_(torch.where(count > 0, moved, running.double()))

    def extra_repr(self) -> str:
        """Describe the arguments."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, sync={self.sync!r}"
