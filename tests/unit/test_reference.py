"""The oracle against numbers worked by hand and against F.batch_norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from syncnorm.reference import RunningStatistics, batch_norm, batch_norm_inference, moments


def test_by_hand():
    """Channel 0: 1, 3 -> mean 2, var 1. Channel 1: 0, 6 -> mean 3, var 9, unbiased 18."""
    x = torch.tensor([[1.0, 0.0], [3.0, 6.0]])
    n, mean, var = moments(x)
    assert (n.item(), mean.tolist(), var.tolist()) == (2.0, [2.0, 3.0], [1.0, 9.0])
    running = RunningStatistics.initial(2)
    y = batch_norm(
        x,
        torch.tensor([2.0, 1.0]),
        torch.tensor([0.0, 5.0]),
        eps=1e-30,
        momentum=0.5,
        running=running,
    )
    assert y.tolist() == [[-2.0, 4.0], [2.0, 6.0]]
    assert running.mean.tolist() == [1.0, 1.5]
    assert running.var.tolist() == [0.5 * 1 + 0.5 * 2, 0.5 * 1 + 0.5 * 18]


def test_a_mask_by_hand():
    """Weights 3 and 1 on 0 and 4: mean 1, var 3, unbiased 4."""
    running = RunningStatistics.initial(1)
    mask = torch.tensor([[3.0], [1.0]])
    y = batch_norm(torch.tensor([[0.0], [4.0]]), mask=mask, eps=1.0, momentum=1.0, running=running)
    assert y.flatten().tolist() == [-0.5, 1.5]
    assert (running.mean.item(), running.var.item()) == (1.0, 4.0)


def test_gradient_by_hand():
    """x = -1, 1 with eps = 3: std 2, xhat = -1/2, 1/2.

    dL/dy = (1, 0): sum g = 1, sum g xhat = -1/2.

    dx = (1 / 2) (g - 1 / 2 - xhat * (-1 / 2) / 2) = (1/2) (1 - 1/2 - 1/8, 0 - 1/2 + 1/8) = (3/16,
    -3/16)
    """
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64, requires_grad=True)
    batch_norm(x, eps=3.0).backward(torch.tensor([[1.0], [0.0]]).double())
    assert x.grad.flatten().tolist() == [0.1875, -0.1875]


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (3, 3, 4, 2)], ids=str)
def test_against_torch(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    weight, bias = torch.randn(2, 3, dtype=torch.float64)
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    running = RunningStatistics.initial(3)
    for _ in range(2):
        expected = F.batch_norm(x, mean, var, weight, bias, training=True, momentum=0.3)
        torch.testing.assert_close(
            batch_norm(x, weight, bias, momentum=0.3, running=running), expected
        )
    torch.testing.assert_close(running.mean, mean)
    torch.testing.assert_close(running.var, var)
    expected = F.batch_norm(x, mean, var, weight, bias)
    torch.testing.assert_close(batch_norm_inference(x, weight, bias, running), expected)
