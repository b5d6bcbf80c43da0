"""Layers that are given to `syncnorm bench`."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn


class Twice(nn.BatchNorm2d):
    """Sends one message of its own: 4 C bytes."""

    def forward(self, input: Tensor) -> Tensor:
        message = input.detach().sum((0, 2, 3))
        dist.all_reduce(message)
        return super().forward(super().forward(input))


class RaisesOnOne(nn.BatchNorm2d):
    """Raises on rank 0, while the others wait for it."""

    def forward(self, input: Tensor) -> Tensor:
        if dist.get_rank() == 0:
            raise ValueError("rank 0 has had enough")
        dist.barrier()
        return super().forward(input)
