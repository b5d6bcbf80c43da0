"""Loss curves of a model trained on shards, and of the same model trained on the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm import SyncBatchNorm, prepare_ddp, scale_loss
from syncnorm.testing import RankPool
from syncnorm.train.models import BasicBlock, ResNet


def resnet18(norm_layer: Callable[[int], nn.Module]) -> nn.Module:
    """ResNet-18 with an eighth of its channels."""
    shape = {"in_channels": 3, "num_classes": 10, "norm_layer": norm_layer}
    return ResNet(BasicBlock, (2, 2, 2, 2), (8, 16, 32, 64), "cifar", **shape)


def batches(steps: int, size: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Four batches of 12x12 images, over and over; the mean drifts along the batch, so that shards
    differ.
    """
    g = torch.Generator().manual_seed(5)
    drift = torch.linspace(-1, 1, size, dtype=torch.float64).view(-1, 1, 1, 1)
    distinct = [
        (
            (torch.randn(size, 3, 12, 12, generator=g, dtype=torch.float64) + drift).to(dtype),
            torch.randint(0, 10, (size,), generator=g),
        )
        for _ in range(4)
    ]
    return [distinct[step % 4] for step in range(steps)]


def train(
    data: Sequence[tuple[Tensor, Tensor]], sizes: Sequence[int], sync: str, ulps: int = 0
) -> list[float]:
    """The curve of a ResNet-18, one weight of which may be moved by one unit in its last place."""
    torch.manual_seed(0)
    model = resnet18(lambda channels: SyncBatchNorm(channels, sync=sync)).to(data[0][0].dtype)
    if ulps:
        _nudge(model, ulps)
    return curve_of(model, data, sizes, lr=0.005)


def curve_of(
    model: nn.Module, data: Sequence[tuple[Tensor, Tensor]], sizes: Sequence[int], lr: float
) -> list[float]:
    """The curve of the large batch's loss. On several ranks each trains on its shard, under DDP."""
    rank = dist.get_rank() if len(sizes) > 1 else 0
    if len(sizes) > 1:
        model = DistributedDataParallel(prepare_ddp(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for images, labels in data:
        optimizer.zero_grad()
        x, y = images.split(list(sizes))[rank], labels.split(list(sizes))[rank]
        loss = F.cross_entropy(model(x), y)
        scaled = scale_loss(loss, len(x))
        scaled.backward()
        optimizer.step()
        losses.append(scaled.detach().double())
    curve = torch.stack(losses)
    if len(sizes) > 1:
        dist.all_reduce(curve)
        curve /= len(sizes)
    return curve.tolist()


def sharded(
    pool: RankPool, data: Sequence[tuple[Tensor, Tensor]], sizes: Sequence[int], sync: str
) -> list[float]:
    curves = pool.run(train, data, sizes, sync)
    assert curves == [curves[0]] * len(sizes)
    return curves[0]


def _nudge(model: nn.Module, which: int) -> None:
    """Change one weight by one unit in its last place."""
    with torch.no_grad():
        weight = model.get_parameter("conv1.weight").view(-1)
        weight[which] = torch.nextafter(weight[which], torch.tensor(torch.inf, dtype=weight.dtype))
