"""Names in mmengine's registries, in the real mmengine; `build_norm_layer` is mmcv's, by its
documented rules.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from syncnorm import SyncBatchNorm, SyncBatchRenorm, convert, revert, scale_loss
from tests.frameworks import frameworks
from tests.model.whole import LR, SIZES, largest_difference, net, shards, train_alone

with_frameworks = frameworks("mmengine.model")


def build_norm_layer(cfg: dict[str, Any], num_features: int) -> nn.Module:
    """mmcv's way: the class by its type in the registry, eps unless given, the rest as keyword
    arguments.
    """
    from mmengine.registry import MODELS

    options = {"eps": 1e-5, **cfg}
    return MODELS.get(options.pop("type"))(num_features, **options)


@pytest.mark.parametrize(
    ("cfg", "cls"),
    [
        ({"type": "PooledBN", "sync": "running", "momentum": 0.03}, SyncBatchNorm),
        ({"type": "PooledBRN", "running_average": "var"}, SyncBatchRenorm),
    ],
)
def test_layers_are_built_from_a_config(cfg, cls):
    import syncnorm.integrations.mmengine  # noqa: F401

    layer = build_norm_layer(cfg, 7)
    assert type(layer) is cls
    for name, value in cfg.items():
        assert name == "type" or getattr(layer, name) == value
    # Their parameter names follow the layer's kind; mmcv has two rules that ours must meet.
    assert not hasattr(cls, "_abbr_")
    assert issubclass(cls, nn.modules.batchnorm._BatchNorm)
    layer.load_state_dict(nn.BatchNorm2d(7).state_dict())


def test_only_torchs_own_layers_are_reverted_on_one_device():
    """What mmengine's runner does when it finds that it is alone."""
    from mmengine.model import revert_sync_batchnorm

    model = nn.Sequential(SyncBatchNorm(3), nn.SyncBatchNorm(3))
    names = [type(m).__name__ for m in revert_sync_batchnorm(model)]
    assert names == ["SyncBatchNorm", "_BatchNormXd"]
    assert type(model[0]) is SyncBatchNorm


def train(is_converted: bool) -> dict[str, Tensor]:
    from mmengine.registry import MODEL_WRAPPERS

    import syncnorm.integrations.mmengine  # noqa: F401

    model = convert(net()) if is_converted else net()
    name = "PooledDistributedDataParallel" if is_converted else "MMDistributedDataParallel"
    wrapped = MODEL_WRAPPERS.build({"type": name, "module": model})
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    for x, y in shards(dist.get_rank()):
        optimizer.zero_grad()
        scale_loss(F.cross_entropy(wrapped(x), y), len(x)).backward()
        optimizer.step()
    assert bool(wrapped.parameters_to_ignore) == is_converted
    return revert(model).state_dict()


def test_two_workers_train_as_one_on_the_whole_batch(pool):
    expected = train_alone(net())
    for state in pool(len(SIZES)).run(train, True):
        assert largest_difference(state, expected) < 1e-12
    local, _ = pool(len(SIZES)).run(train, False)
    assert largest_difference(local, expected) > 1e-3, "the negative control"
