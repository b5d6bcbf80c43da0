"""The rules that `benchmarks.lagged_rules` compares, held against torch's layer and ours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.lagged_rules import BATCH_NORM, LAGGED, RULES, WORKERS, Layer
from syncnorm import SyncBatchNorm, prepare_ddp

CHANNELS, STEPS = 5, 12


def _batches() -> list[tuple[Tensor, Tensor]]:
    """Inputs of 4 unlike workers that drift, with a jump, and cotangents of the outputs."""
    g = torch.Generator().manual_seed(0)
    worker = torch.arange(WORKERS).repeat_interleave(4).view(-1, 1, 1)
    return [
        (
            torch.randn(4 * WORKERS, CHANNELS, 6, generator=g) + worker + 0.1 * step + step // 7,
            torch.randn(4 * WORKERS, CHANNELS, 6, generator=g) + 0.3 * worker,
        )
        for step in range(STEPS)
    ]


def _course(layer: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The output and the gradient of the input in each step."""
    seen = []
    for x, cotangent in _batches():
        x.requires_grad_()
        y = layer(x)
        (grad,) = torch.autograd.grad(y, x, cotangent)
        seen.append((y.detach(), grad))
    return seen


def _rule(name: str) -> Layer:
    layer = Layer(CHANNELS, RULES[name])
    # Ours averages gradient means before the weight, which is 1 here.
    layer.weight.requires_grad_(False)
    return layer


@pytest.mark.parametrize(
    ("name", "other"),
    [
        (BATCH_NORM, nn.BatchNorm1d(CHANNELS)),
        (LAGGED, prepare_ddp(nn.Sequential(SyncBatchNorm(CHANNELS, sync="lagged", affine=False)))),
    ],
    ids=["batch", "lagged"],
)
def test_a_rule_is_that_of_the_layer_of_its_name(name, other):
    layer = _rule(name)
    for (y, grad), (other_y, other_grad) in zip(_course(layer), _course(other), strict=True):
        torch.testing.assert_close(y, other_y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grad, other_grad, rtol=1e-4, atol=1e-5)
    assert name == BATCH_NORM or 0 < sum(layer.waited[2:]) < STEPS - 2, "the guard must fire, too"


# These drift too much here, or have too few steps, ever to stop waiting.
ALWAYS_WAIT = {BATCH_NORM, "lagged, guard at 0.1", "lagged, 20 steps pooled at first"}


@pytest.mark.parametrize("name", RULES)
def test_each_rule_departs_from_batch_norm_unless_it_waits(name):
    apart = [
        not torch.allclose(grad, expected, atol=1e-4)
        for (_, grad), (_, expected) in zip(
            _course(_rule(name)), _course(_rule(BATCH_NORM)), strict=True
        )
    ]
    assert not apart[0], "the first step waits"
    assert any(apart) == (name not in ALWAYS_WAIT)


def _shift(name: str) -> float:
    """The largest part of all workers' gradients together along a shift of the input."""
    return max(grad.mean((0, 2)).abs().max().item() for _, grad in _course(_rule(name)))


def test_what_is_left_of_gradients_has_no_part_along_a_shift():
    assert _shift(BATCH_NORM) < 1e-6
    assert _shift("batch, residuals") < 1e-6
    assert _shift(LAGGED) > 1e-2


def test_a_regression_sees_a_change_that_all_workers_share():
    """Statistics of the same step, for inputs that move by as much on each worker."""
    layer = _rule("regressed, residuals")
    x = torch.randn(4 * WORKERS, CHANNELS, 6, generator=torch.Generator().manual_seed(1))
    expected = (x - x.mean((0, 2), keepdim=True)) / x.std((0, 2), correction=0, keepdim=True)
    for step in range(30):
        y = layer(x + 0.2 * step).detach()
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    assert sum(layer.waited) < 30, "nothing is shown by a step that waits"
