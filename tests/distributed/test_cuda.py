"""The layers on a CUDA device; skipped, saying so, where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from syncnorm import RenormSchedule, SyncBatchNorm, SyncBatchRenorm, prepare_ddp
from syncnorm.testing import assert_close
from tests.distributed.steps import Batch, make_layer, oracle_steps, parameters

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("options", [{}, {"bounds": (1.25, 0.25)}], ids=["norm", "renorm"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_equals_the_oracle(dtype, channels_last, masked, options):
    batch = Batch.random((8, 5, 6, 7), dtype, channels_last=channels_last, masked=masked)
    expected = oracle_steps([batch], options)[0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layer = make_layer(5, dtype=wide, **options).cuda()
    with torch.no_grad():
        weight, bias = parameters(5, wide)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    x = batch.x.cuda().requires_grad_()
    y = layer(x, None if batch.mask is None else batch.mask.cuda())
    y.backward(batch.cotangent.cuda())
    assert x.grad is not None
    assert y.stride() == x.stride() == x.grad.stride()
    assert_close(y.cpu(), expected.y, dtype, "y", factor=2.0)
    assert_close(x.grad.cpu(), expected.grad_input, dtype, "grad_input", factor=2.0)
    for name, value in layer.named_buffers():
        assert_close(value.cpu(), expected.buffers[name], wide, name)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SyncBatchNorm(3, momentum=None),
        lambda: SyncBatchRenorm(3, schedule=RenormSchedule(3.0, 5.0, 0, 10, 10)),
        lambda: SyncBatchNorm(3, sync="running"),
        lambda: SyncBatchRenorm(3, sync="running"),
    ],
)
def test_a_training_step_does_not_wait_for_the_device(make):
    model = prepare_ddp(_Masked(make().cuda()))
    x = torch.randn(4, 3, 5, device="cuda", requires_grad=True)
    g, mask = torch.randn_like(x), torch.ones(4, 1, 5, device="cuda")
    model(x, mask).backward(g)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            model(x, mask).backward(g)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _Masked(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.layer(x, mask)
