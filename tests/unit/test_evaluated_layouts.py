"""Evaluation of images in every layout: outputs and gradients, which torch's own gets wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from syncnorm import SyncBatchNorm, SyncBatchRenorm
from syncnorm.testing import assert_close

# Layouts of x, of which some have strides of sizes of 1 that say nothing.
LAYOUTS = {
    "one image": lambda: torch.randn(4, 3, 5).permute(2, 0, 1).unsqueeze(0),
    "one volume": lambda: torch.randn(2, 3, 4, 5).permute(3, 0, 1, 2).unsqueeze(0),
    "tokens": lambda: torch.randn(7, 4, 5).transpose(1, 2).unsqueeze(-1),
    "tokens, 5-D": lambda: torch.randn(7, 4, 5).transpose(1, 2)[..., None, None],
    "one row": lambda: torch.randn(7, 4, 3, 5).permute(0, 3, 1, 2)[:, :, :1],
    "contiguous": lambda: torch.randn(7, 5, 4, 1),
    "contiguous, one": lambda: torch.randn(1, 5, 4, 3),
    "contiguous, 5-D": lambda: torch.randn(3, 5, 1, 4, 1),
}


def gradients_in_evaluation(layer: nn.Module, x: torch.Tensor, g: torch.Tensor) -> list[float]:
    """How far each gradient is off, of new layers."""
    x = x.detach().requires_grad_()
    layer.eval()(x).backward(g)
    dims = [dim for dim in range(x.ndim) if dim != 1]
    scale = (1 + layer.eps) ** -0.5
    expected = {x: scale * g, layer.weight: scale * (g * x).sum(dims), layer.bias: g.sum(dims)}
    return [(leaf.grad - e).abs().max().item() for leaf, e in expected.items()]


@pytest.mark.parametrize("make", [SyncBatchNorm, SyncBatchRenorm])
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_in_evaluation_are_right_in_every_layout(make, name):
    x = LAYOUTS[name]()
    others = [each() for each in LAYOUTS.values()]
    for g in (torch.randn_like(x), *others, *(each.movedim(-1, 1) for each in others)):
        if g.shape == x.shape:
            assert max(gradients_in_evaluation(make(5), x, g)) < 1e-4
    # As a head for tokens gives it back.
    g = torch.randn(x.flatten(2).transpose(1, 2).shape).transpose(1, 2).unflatten(2, x.shape[2:])
    assert max(gradients_in_evaluation(make(5), x, g)) < 1e-4
    layer = make(5).eval()
    with torch.no_grad():
        y = layer(x)
    assert layer(x).stride() == y.stride()


@pytest.mark.parametrize("make", [SyncBatchNorm, SyncBatchRenorm])
def test_evaluation_of_images_is_mapped_and_traced(make):
    layer, images = make(5).eval(), torch.randn(6, 4, 3, 5).permute(0, 3, 1, 2)
    expected = layer(images)
    assert_close(torch.vmap(lambda x: layer(x[None])[0])(images), expected, torch.float32, "vmap")
    sums = torch.func.vmap(torch.func.grad(lambda x: layer(x[None]).sum()))(images)
    assert_close(sums, torch.full_like(images, (1 + layer.eps) ** -0.5), torch.float32, "gradient")
    tokens = torch.randn(7, 4, 5).transpose(1, 2).unsqueeze(-1)
    assert torch.equal(torch.jit.trace(layer, (tokens,))(tokens), layer(tokens))
