"""A model that was converted and is sharded under DistributedDataParallel trains as torch's does on
the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from syncnorm import convert, prepare_ddp, revert, scale_loss
from tests.model.foreign import ARCHITECTURES

STEPS, SIZE, SIZES = 5, 9, (6, 3)


def _batches() -> list[tuple[Tensor, Tensor]]:
    """The mean drifts along each batch, so that shards differ."""
    g = torch.Generator().manual_seed(5)
    drift = torch.linspace(-1, 1, SIZE, dtype=torch.float64).view(-1, 1, 1, 1)
    images = torch.randn(STEPS, SIZE, 3, 16, 16, generator=g, dtype=torch.float64) + drift
    return list(zip(images, torch.randint(0, 5, (STEPS, SIZE), generator=g), strict=True))


def _train(
    name: str, sizes: Sequence[int], is_converted: bool
) -> tuple[list[float], dict[str, Tensor]]:
    """The curve of the large batch's loss, and the state at the end, reverted if it was converted."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().double()
    if is_converted:
        convert(model)
    rank = dist.get_rank() if len(sizes) > 1 else 0
    trained = DistributedDataParallel(prepare_ddp(model)) if len(sizes) > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for images, labels in _batches():
        optimizer.zero_grad()
        x, y = images.split(list(sizes))[rank], labels.split(list(sizes))[rank]
        loss = F.cross_entropy(trained(x), y)
        if len(sizes) > 1:
            loss = scale_loss(loss, len(x))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    curve = torch.stack(losses)
    if len(sizes) > 1:
        dist.all_reduce(curve)
        curve /= len(sizes)
    return curve.tolist(), {key: value.clone() for key, value in revert(model).state_dict().items()}


@pytest.mark.parametrize("name", ["digits_resnet", "transformers ResNet"])
def test_two_workers_train_as_torchs_model_on_the_whole_batch(pool, name):
    if name.startswith("transformers"):
        pytest.importorskip("transformers", reason="transformers is not installed")
    curve, state = _train(name, (SIZE,), False)
    assert min(abs(a - b) for a, b in pairwise(curve)) > 1e-2, "the run must go somewhere"
    for got, sharded in pool(len(SIZES)).run(_train, name, SIZES, True):
        assert got == pytest.approx(curve, rel=1e-10)
        assert sharded.keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(sharded[key], value, rtol=1e-10, atol=1e-10, msg=key)
    # The negative control: torch's own layers normalise each shard by itself.
    (local, _), _ = pool(len(SIZES)).run(_train, name, SIZES, False)
    assert local[-1] != pytest.approx(curve[-1], rel=1e-3)
