"""`syncnorm.gather`: a loss over all rows, and rows that do not go together."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm import convert, gather, prepare_ddp, scale_loss
from syncnorm.errors import FaultError
from syncnorm.testing import assert_close

SIZES = [3, 0, 4]


def _batch() -> Tensor:
    return torch.randn(7, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _loss(own: Tensor, everybodys: Tensor) -> Tensor:
    return (own.flatten(1) @ everybodys.flatten(1).T).logsumexp(1).sum()


def _gradient() -> tuple[Tensor, Tensor | None]:
    x = _batch().split(SIZES)[dist.get_rank()].clone().requires_grad_()
    everybodys = gather(x)
    _loss(x, everybodys).backward()
    return everybodys.detach(), x.grad


def test_the_gradient_is_that_of_the_loss_over_the_whole_batch(pool):
    whole = _batch().requires_grad_()
    _loss(whole, whole).backward()
    assert whole.grad is not None
    for expected, (rows, gradient) in zip(
        whole.grad.split(SIZES), pool(3).run(_gradient), strict=True
    ):
        assert torch.equal(rows, _batch())
        assert_close(gradient, expected, torch.float64, "gradient")


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()


def _contrast(rows: Tensor, y: Tensor, keys: Tensor, labels: Tensor) -> Tensor:
    likeness = (rows @ keys.T).log_softmax(1)
    return -(likeness * (y[:, None] == labels)).sum(1).mean()


def _trained() -> list[Tensor | None]:
    """The gradients of a contrastive loss under DDP, as docs/ddp.md takes them."""
    model = prepare_ddp(convert(_network()))
    ddp_model = DistributedDataParallel(model)
    rank = dist.get_rank()
    x, y = _batch().split(SIZES)[rank], (torch.arange(7) % 3).split(SIZES)[rank]
    features = ddp_model(x)
    keys, labels = gather(features), gather(y.double()).long()
    scale_loss(_contrast(features, y, keys, labels), len(x)).backward()
    return [each.grad for each in model.parameters()]


def test_a_contrastive_loss_under_ddp_has_the_gradients_of_the_whole_batch(pool):
    whole, y = _network(), torch.arange(7) % 3
    features = whole(_batch())
    _contrast(features, y, features, y).backward()
    for gradients in pool(3).run(_trained):
        for got, parameter in zip(gradients, whole.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, rtol=1e-10, atol=1e-10)


def _penalty(order: int) -> Tensor:
    """The gradient of a penalty on a gradient, or of one on that, by this worker's rows."""
    x = _batch().flatten(1).split(SIZES)[dist.get_rank()].clone().requires_grad_()
    value = (x @ gather(x).T).sin().sum()
    for _ in range(order - 1):
        (g,) = torch.autograd.grad(value, x, create_graph=True)
        value = g.square().sum()
    return torch.autograd.grad(value, x)[0]


@pytest.mark.parametrize("order", [2, 3])
def test_gradients_of_any_order_are_those_of_the_whole_batch(pool, order):
    whole = _batch().flatten(1).requires_grad_()
    value = (whole @ whole.T).sin().sum()
    for _ in range(order - 1):
        (g,) = torch.autograd.grad(value, whole, create_graph=True)
        value = g.square().sum()
    (expected,) = torch.autograd.grad(value, whole)
    for part, got in zip(expected.split(SIZES), pool(3).run(_penalty, order), strict=True):
        torch.testing.assert_close(got, part, rtol=1e-10, atol=1e-10)


def _unlike(shapes: list[tuple[int, ...]]) -> str:
    with pytest.raises(FaultError) as caught:
        gather(torch.ones(shapes[dist.get_rank()]))
    return str(caught.value)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ([(2, 4), (2, 3)], "rows of 4 numbers on rank 0, 3 numbers on rank 1"),
        ([(2, 4), (0, 3)], "rows of 4 numbers on rank 0, 3 numbers on rank 1"),
        ([(2, 2, 3), (2, 3, 2)], "rows of 6 numbers on rank 0, 6 numbers on rank 1"),
        ([(2,), (2, 1)], "rows of 1 numbers on rank 0, 1 numbers on rank 1"),
    ],
)
def test_rows_of_unlike_shapes_are_one_error_on_all(pool, shapes, said):
    for message in pool(2).run(_unlike, shapes):
        assert message == f"`x` must have rows of one shape on all workers, got {said}"
