"""Typical uses, as a program has them that is checked in strict mode; `test_types.py` checks it."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm import (
    SAM,
    ElasticBatchSampler,
    RenormSchedule,
    SyncBatchNorm,
    SyncBatchRenorm,
    accumulate,
    adopt_state_dict,
    conversion_table,
    convert,
    convert_sync_batchnorm,
    evaluation_statistics,
    explain,
    frozen_statistics,
    gather,
    join,
    prepare_ddp,
    recalibrate,
    revert,
    scale_loss,
    train_only_norms,
)
from syncnorm.family import PowerNorm
from syncnorm.module import SyncNorm


class Net(nn.Module):
    """A model of the user's, with something of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def features(self, x: Tensor) -> Tensor:
        return x


def a_model_keeps_its_type(x: Tensor, batches: list[Tensor]) -> Tensor:
    model = assert_type(convert(Net()), Net)
    model = assert_type(convert(model, SyncBatchRenorm, schedule=RenormSchedule()), Net)
    model = assert_type(convert(model, PowerNorm, select="norm"), Net)
    model = assert_type(convert_sync_batchnorm(model), Net)
    model = assert_type(prepare_ddp(model), Net)
    model = assert_type(recalibrate(model, batches, mix=0.5), Net)
    model = assert_type(train_only_norms(model), Net)
    model = assert_type(revert(model, to=nn.BatchNorm2d), Net)
    assert_type(convert(nn.Sequential(nn.BatchNorm1d(3))), nn.Sequential)
    assert_type(adopt_state_dict(model, {"norm.weight": x}).notes, tuple[str, ...])
    assert_type(conversion_table(model), str)
    return model.features(x)


def a_layer_becomes_another(layer: nn.BatchNorm2d) -> None:
    assert_type(convert(layer), SyncBatchNorm)
    assert_type(convert(layer, momentum=0.2), SyncBatchNorm)
    assert_type(convert(layer, SyncBatchRenorm), SyncBatchRenorm)
    assert_type(convert(layer, PowerNorm), PowerNorm)
    assert_type(convert_sync_batchnorm(layer), SyncNorm)
    back: nn.modules.batchnorm._BatchNorm = revert(SyncBatchNorm(3), to=nn.BatchNorm1d)  # pyright: ignore[reportPrivateUsage]
    assert back.running_mean is not None
    assert_type(SyncBatchNorm(3).running_mean, Tensor | None)


def a_training_loop(x: Tensor, sizes: list[int]) -> None:
    model = DistributedDataParallel(prepare_ddp(convert(Net())))
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
    sampler = ElasticBatchSampler(len(sizes), 8)
    for part in sampler:
        assert_type(part, list[int])
        with join(model), accumulate(model), frozen_statistics(model):
            loss = assert_type(scale_loss(model(x[part]).mean(), len(part)), Tensor)
            loss.backward()  # pyright: ignore[reportUnknownMemberType] (torch's own)
    with evaluation_statistics(model, "batch"):
        assert_type(gather(model(x)), Tensor)
    print(explain(model, x), optimizer.rho)
