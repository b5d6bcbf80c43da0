"""Membrane potential batch norm over time steps, and folded into a threshold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from syncnorm.comm import exchange
from syncnorm.errors import ExchangeError
from syncnorm.family import MembranePotentialBatchNorm
from syncnorm.testing import shard
from tests.distributed import family_reference as reference
from tests.distributed.family_reference import close

CHANNELS, TIMES = 3, 4


def made() -> MembranePotentialBatchNorm:
    layer = MembranePotentialBatchNorm(CHANNELS).double()
    with torch.no_grad():
        assert layer.weight is not None
        assert layer.bias is not None
        layer.weight.copy_(torch.tensor([1.3, -0.7, 0.4]))
        layer.bias.copy_(torch.tensor([0.2, 0.5, -0.1]))
    return layer


def fire(norm: Any, inputs: Tensor) -> Tensor:
    """Spikes, softly, of neurons with inputs (T, N, C, *S): the authors' loop."""
    u, spikes = torch.zeros_like(inputs[0]), []
    for each in inputs:
        u = 0.25 * u + each
        spikes.append(torch.sigmoid(3 * (norm(u) - 0.5)))
        u = u * (1 - spikes[-1])
    return torch.stack(spikes)


def on_rank(inputs: Tensor, cotangent: Tensor) -> dict[str, Any]:
    layer, x = made(), inputs.transpose(0, 1).contiguous().requires_grad_()
    with exchange.record() as exchanges:
        spikes = fire(layer, x)
        spikes.backward(cotangent.transpose(0, 1))
    return {
        "spikes": spikes.detach().transpose(0, 1),
        "grad": x.grad.transpose(0, 1),
        "weight": layer.weight.grad,
        "state": layer.state_dict(),
        "sent": [e.kind for e in exchanges],
    }


@pytest.mark.parametrize("sizes", [(3, 2), (5, 0), (1, 0, 4)], ids=str)
def test_time_steps_equal_the_whole_batch(pool, sizes):
    generator = torch.Generator().manual_seed(0)
    inputs, cotangent = torch.randn(
        2, sum(sizes), TIMES, CHANNELS, 4, generator=generator, dtype=torch.float64
    )
    by_rank = pool(len(sizes)).run_each(
        on_rank, list(zip(shard(inputs, sizes), shard(cotangent, sizes)))
    )
    state = {k: v.detach().clone() for k, v in made().state_dict().items()}
    state["weight"].requires_grad_()
    x = inputs.transpose(0, 1).requires_grad_()
    spikes = fire(lambda u: reference.membrane_batch_norm(u, state, 1e-5, 0.1), x)
    grad, weight = torch.autograd.grad(spikes, [x, state["weight"]], cotangent.transpose(0, 1))
    close(torch.cat([r["spikes"] for r in by_rank]), spikes.transpose(0, 1))
    close(torch.cat([r["grad"] for r in by_rank]), grad.transpose(0, 1))
    close(sum(r["weight"] for r in by_rank), weight)
    for each in by_rank:
        close(each["state"]["running_var"], state["running_var"])
        assert each["state"]["num_batches_tracked"] == TIMES
        assert each["sent"] == ["moments"] * TIMES + ["gradients"] * TIMES


def other_times(rank: int) -> str:
    """Take a time step less on rank 1."""
    x = torch.randn(TIMES - rank, 2, CHANNELS, 4, requires_grad=True)
    try:
        fire(MembranePotentialBatchNorm(CHANNELS), x).sum().backward()
    except ExchangeError as error:
        return str(error)
    return "nothing was raised"


def test_other_numbers_of_time_steps_are_an_error_on_every_worker(pool):
    by_rank = pool(2).run_each(other_times, [(0,), (1,)])
    assert by_rank[0] == by_rank[1]
    forward, backward = f"moments, {2 * CHANNELS + 1} float64", f"gradients, {2 * CHANNELS} float64"
    assert forward in by_rank[0]
    assert backward in by_rank[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_a_folded_threshold_fires_as_the_layer_does(dtype, affine):
    generator = torch.Generator().manual_seed(1)
    channels = 64
    layer = MembranePotentialBatchNorm(channels, affine=affine).to(dtype)
    u = 2 * torch.randn(50, channels, 4, generator=generator).to(dtype) + 0.3
    if affine:
        with torch.no_grad():
            layer.weight.copy_(torch.randn(channels, generator=generator))
            layer.bias.copy_(torch.randn(channels, generator=generator))
            layer.weight[:6] = 0
            layer.weight[0] = -0.0
    layer(u)
    layer.eval()
    for threshold in (0.5, -0.2, 0.0):
        spikes = (layer(u) > threshold).to(dtype)
        folded = layer.folded_threshold(threshold)
        assert torch.equal(folded(u), spikes)
        assert 0.1 < spikes.mean() < 0.9
    if affine:
        # Channels of weight 0 fire always or never, and those of negative weight from below.
        assert folded.value[:6].isinf().all()
        assert set(folded.value[:6].tolist()) == {-torch.inf, torch.inf}
        assert not torch.equal((u > folded.value[:, None]).to(dtype), spikes)


def test_a_folded_threshold_is_a_module_with_a_state():
    layer = made()
    layer(torch.randn(20, CHANNELS, dtype=torch.float64))
    folded = layer.folded_threshold(0.5)
    other = MembranePotentialBatchNorm(CHANNELS).folded_threshold(0.1).double()
    other.load_state_dict(folded.state_dict())
    u = torch.randn(20, CHANNELS, dtype=torch.float64)
    assert isinstance(other, nn.Module)
    assert torch.equal(other(u), folded(u))
