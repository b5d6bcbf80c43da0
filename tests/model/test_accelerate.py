"""The one line before `accelerator.prepare`, in the real Accelerate."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from syncnorm import convert, prepare_ddp, revert, scale_loss
from tests.frameworks import frameworks
from tests.model.whole import (
    LR,
    SIZES,
    as_torchruns_worker,
    largest_difference,
    net,
    shards,
    train_alone,
)

with_frameworks = frameworks("accelerate")


def train(is_converted: bool) -> tuple[dict[str, Tensor], str]:
    """Train this worker's shards; the state at the end, and what Accelerate made of the model."""
    from accelerate import Accelerator

    with as_torchruns_worker():
        accelerator = Accelerator(cpu=True)
        model = net()
        if is_converted:
            model = prepare_ddp(convert(model).to(accelerator.device))
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        for x, y in shards(dist.get_rank()):
            optimizer.zero_grad()
            accelerator.backward(scale_loss(F.cross_entropy(wrapped(x), y), len(x)))
            optimizer.step()
    return revert(accelerator.unwrap_model(wrapped)).state_dict(), type(wrapped).__name__


def test_two_workers_train_as_one_on_the_whole_batch(pool):
    expected = train_alone(net())
    for state, wrapper in pool(len(SIZES)).run(train, True):
        assert wrapper == "DistributedDataParallel"
        assert largest_difference(state, expected) < 1e-12
    (local, _), _ = pool(len(SIZES)).run(train, False)
    assert largest_difference(local, expected) > 1e-3, "the negative control"
