"""Layers that keep running statistics and are no batch norms of torch's: they stay local, and that
is said.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.ao.nn.intrinsic import qat
from torch.ao.quantization import MovingAverageMinMaxObserver, default_qat_qconfig
from torch.nn.parallel import DistributedDataParallel

from syncnorm import (
    SyncBatchNorm,
    conversion_table,
    convert,
    convert_sync_batchnorm,
    explain,
    prepare_ddp,
    register_adapter,
)
from syncnorm.errors import InputError
from syncnorm.family import L1BatchNorm
from tests.model.parts import HomeMade


class FrozenBatchNorm2d(nn.Module):
    """As torchvision, detectron2 and DETR have it: nothing is learnt."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, fill in (
            ("weight", 1.0),
            ("bias", 0.0),
            ("running_mean", 0.0),
            ("running_var", 1.0),
        ):
            self.register_buffer(name, torch.full((channels,), fill))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class FrozenNorm(HomeMade):
    """Says so by name only."""


class _WithForward(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


register_adapter(_WithForward, lambda layer, x, normalize: normalize(x).relu())


def _said(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    "names",
    [
        ("running_mean", "running_var"),  # torchrl, torch_geometric's HeteroBatchNorm
        ("running_mean", "running_std"),
        ("moving_mean", "moving_variance"),
        ("ra_mean", "ra_var"),  # sb3-contrib
    ],
    ids=str,
)
def test_home_made_layers_are_named_once_by_each_who_leaves_them_alone(names):
    model = nn.Sequential(
        nn.Linear(3, 4), HomeMade(4, names), nn.BatchNorm1d(4), nn.Sequential(HomeMade(4, names))
    )
    sentence = (
        "`model` keeps running statistics in layers of its own, '1' (HomeMade), '3.0' (HomeMade): "
        "convert leaves them "
        "alone, each worker has statistics of its own batches, and DistributedDataParallel "
        "overwrites them with rank "
        "0's unless it is told not to. Build such layers on torch.nn.BatchNorm1d, 2d or 3d, or on "
        "syncnorm.functional.sync_batch_norm."
    )
    found = explain(model, torch.zeros(6, 3), 2)
    assert found.lints == [sentence]
    assert [(row.layer, row.now, row.convert) for row in found.rows][::2] == [
        ("1", "HomeMade", "unchanged"),
        ("3.0", "HomeMade", "unchanged"),
    ]
    for call in (convert, prepare_ddp, convert_sync_batchnorm):
        assert _said(lambda call=call: call(model)) == [sentence]
    assert conversion_table(model).splitlines()[2:] == [f"! {sentence}"]
    assert _said(lambda: convert(model, select="^2$")) == [], "those were not chosen"
    assert _said(lambda: convert(model, select=lambda name, layer: layer.num_features > 3)) == []
    (said,) = _said(lambda: convert(model, select="^[23]"))
    assert "of its own, '3.0' (HomeMade): convert" in said
    model[1].eval()
    assert "'1' (HomeMade)" not in explain(model).lints[0], "it is frozen"


@pytest.mark.parametrize(
    "layer",
    [
        FrozenBatchNorm2d(4),
        FrozenNorm(4),
        nn.InstanceNorm1d(4, track_running_stats=True),
        nn.Sequential(nn.BatchNorm1d(4)),  # a wrapper, such as torch_geometric's
        _WithForward(4),
        SyncBatchNorm(4),
        nn.LazyBatchNorm1d(),
        MovingAverageMinMaxObserver(),
        qat.ConvBn1d(4, 4, 1, qconfig=default_qat_qconfig),
    ],
    ids=lambda m: type(m).__name__,
)
def test_nothing_is_said_of_layers_that_are_no_batch_norm_of_their_own(layer):
    model = nn.Sequential(layer, nn.BatchNorm1d(4))
    assert explain(model).lints == []
    assert _said(lambda: prepare_ddp(convert(model))) == []
    assert "!" not in conversion_table(model)


def test_layers_that_torch_jit_has_compiled():
    scripted = torch.jit.script(nn.Sequential(nn.Identity(), _Plain(4)))
    (said,) = _said(lambda: prepare_ddp(nn.Sequential(scripted, SyncBatchNorm(4))))
    assert "'0.1' (_Plain): convert leaves" in said


class _Plain(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, training=self.training
        )


def _home_made_under_ddp() -> tuple[Tensor, Tensor]:
    model = DistributedDataParallel(prepare_ddp(nn.Sequential(HomeMade(3), SyncBatchNorm(3))))
    model(torch.randn(6, 3) + dist.get_rank()).sum().backward()
    own = model.module[0].running_mean.clone()
    model(torch.zeros(6, 3))
    return own, (model.module[0].running_mean / 0.9).clone()


def test_what_is_said_is_so(pool):
    """Each worker's own statistics, then rank 0's in their place."""
    (own0, _), (own1, given1) = pool(2).run(_home_made_under_ddp)
    assert not torch.allclose(own0, own1)
    assert torch.allclose(given1, own0)


@pytest.mark.parametrize("to", [SyncBatchNorm, L1BatchNorm])
@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Sequential(nn.Linear(2, 2)), "no batch norm: nothing was converted.$"),
        (
            nn.Sequential(FrozenBatchNorm2d(3), nn.ReLU()),
            r"nothing was converted. Its layers '0' \(FrozenBatchNorm2d\) apply running statistics",
        ),
        (
            nn.Sequential(HomeMade(3)),
            r"in layers of its own, '0' \(HomeMade\): convert leaves them",
        ),
    ],
    ids=["none", "frozen", "home-made"],
)
def test_a_model_without_batch_norms_is_left_with_a_word(model, said, to):
    with pytest.warns(UserWarning, match=said) as caught:
        assert convert(model, to) is model
    assert [each.filename for each in caught] == [__file__]
    with pytest.raises(InputError, match="at least one batch norm, got none of 0 with 'body'"):
        convert(model, to, select="body")
