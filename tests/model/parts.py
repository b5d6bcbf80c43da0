"""What the tests of whole models share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from syncnorm import RenormSchedule, SyncBatchNorm, SyncBatchRenorm

KINDS = {
    "norm": lambda channels: SyncBatchNorm(channels, sync="running", dtype=torch.float64),
    "renorm": lambda channels: SyncBatchRenorm(
        channels, schedule=RenormSchedule.constant(2.0, 1.0), sync="running", dtype=torch.float64
    ),
}


def uneven_batch(size: int, seed: int, channels: int = 4) -> Tensor:
    """Samples that differ in mean, so that shards are not alike."""
    g = torch.Generator().manual_seed(seed)
    offset = torch.linspace(-3, 3, max(size, 1), dtype=torch.float64)[:size].view(-1, 1, 1)
    return torch.randn(size, channels, 5, generator=g, dtype=torch.float64) + offset


def batches_of(rank: int, count: int) -> list[Tensor]:
    """A worker's batches, of sizes that differ by worker and step."""
    return [uneven_batch(2 + (rank + 2 * step) % 4, 100 * rank + step) for step in range(count)]


def union_of(counts: list[int]) -> list[Tensor]:
    """The whole batches of workers that have so many."""
    shards = [batches_of(rank, count) for rank, count in enumerate(counts)]
    return [torch.cat([s[step] for s in shards if step < len(s)]) for step in range(max(counts))]


def selective_contexts(ours_alone: bool = False) -> Any:
    """The contexts of a checkpoint that is to save each result, but a convolution's or a tanh's.

    Or those of syncnorm's own operators alone, for compiled code that runs operators one by one.
    """
    recomputed = ("aten.convolution.default", "aten.tanh.default")

    def choose(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name, policy = str(operator), CheckpointPolicy
        is_saved = name.startswith("syncnorm.") if ours_alone else name not in recomputed
        return policy.MUST_SAVE if is_saved else policy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(choose)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False)


class Masked(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.layer(x, mask)


class RaisesOnce(nn.Module):
    has_raised = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.has_raised:
            self.has_raised = True
            raise RuntimeError("once")
        return x


class HomeMade(nn.Module):
    """A batch norm that is no subclass of torch's; `names` of its buffers for mean and variance."""

    def __init__(
        self, channels: int, names: tuple[str, str] = ("running_mean", "running_var")
    ) -> None:
        super().__init__()
        self.register_buffer(names[0], torch.zeros(channels))
        self.register_buffer(names[1], torch.ones(channels))
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.buffers()
        return nn.functional.batch_norm(x, mean, var, self.weight, training=self.training)
