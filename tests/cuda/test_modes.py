"""Every mode and what acts on models, on ranks that share a device: the same as on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from syncnorm import prepare_ddp
from tests.cuda import scenarios

pytestmark = pytest.mark.cuda

SYNCS = ["batch", "running", "lagged", "none"]


@pytest.mark.parametrize("kind", ["norm", "renorm"])
@pytest.mark.parametrize("sync", SYNCS)
def test_training(equal_on_both, sync, kind):
    equal_on_both(2, scenarios.train, kind, sync)


@pytest.mark.parametrize("is_reentrant", [True, False], ids=["re-entrant", "not re-entrant"])
@pytest.mark.parametrize("sync", SYNCS)
def test_activation_checkpointing(equal_on_both, sync, is_reentrant):
    equal_on_both(2, scenarios.train, "renorm", sync, is_reentrant)


@pytest.mark.parametrize("sync", SYNCS)
def test_accumulate(equal_on_both, sync):
    equal_on_both(2, scenarios.train, "renorm", sync, None, True)


@pytest.mark.parametrize("sync", ["batch", "running"])
def test_join(equal_on_both, sync):
    equal_on_both(2, scenarios.train_until_data_ends, sync)


def test_whole_models(equal_on_both):
    equal_on_both(2, scenarios.whole_models)


@pytest.mark.parametrize("kind", ["norm", "renorm"])
def test_gradient_of_gradient(equal_on_both, kind):
    equal_on_both(2, scenarios.gradient_of_gradient, kind)


def test_functional_form(equal_on_both):
    equal_on_both(2, scenarios.functional_form)


@pytest.mark.parametrize("sync", SYNCS)
def test_autocast(device, sync):
    """The layer sees what autocast gives it, and keeps its statistics in float32."""
    layer = scenarios.make("norm", 8, sync=sync)
    model = prepare_ddp(nn.Sequential(nn.Conv2d(3, 8, 3), layer).to(device))
    x = torch.randn(4, 3, 9, 9, device=device)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        y = model(x)
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert layer.running_mean is not None
    assert layer.running_mean.dtype == torch.float32
    # Zero mean, unit variance, within the roundings of the output.
    assert y.float().mean((0, 2, 3)).abs().max() < 0.01
    assert (y.float().var((0, 2, 3)) - 1.0).abs().max() < 0.02
