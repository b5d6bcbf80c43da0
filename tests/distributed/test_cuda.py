"""The layer on a CUDA device; skipped, saying so, where there is none."""

from __future__ import annotations

import pytest
import torch

from syncnorm import SyncBatchNorm
from syncnorm.testing import assert_close
from tests.distributed.steps import Batch, oracle_steps, parameters

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_oracle(dtype, channels_last, masked):
    batch = Batch.random((8, 5, 6, 7), dtype, channels_last=channels_last, masked=masked)
    expected = oracle_steps([batch], {})[0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layer = SyncBatchNorm(5, device="cuda", dtype=wide)
    with torch.no_grad():
        weight, bias = parameters(5, wide)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    x = batch.x.cuda().requires_grad_()
    y = layer(x, None if batch.mask is None else batch.mask.cuda())
    y.backward(batch.cotangent.cuda())
    assert x.grad is not None
    assert y.stride() == x.stride() == x.grad.stride()
    assert_close(y.cpu(), expected.y, dtype, "y")
    assert_close(x.grad.cpu(), expected.grad_input, dtype, "grad_input")
    for name, value in layer.named_buffers():
        assert_close(value.cpu(), expected.buffers[name], wide, name)


def test_a_training_step_does_not_wait_for_the_device():
    layer = SyncBatchNorm(3, device="cuda", momentum=None)
    x = torch.randn(4, 3, 5, device="cuda", requires_grad=True)
    g = torch.randn_like(x)
    layer(x).backward(g)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, torch.ones(4, 1, 5, device="cuda")).backward(g)
    finally:
        torch.cuda.set_sync_debug_mode("default")
