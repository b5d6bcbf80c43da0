"""Activation checkpointing of the family: a repeated forward sees what the first saw, alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from syncnorm.comm import exchange
from syncnorm.errors import ExchangeError, InputError
from syncnorm.family import (
    BalancedBatchNorm,
    BatchChannelNorm,
    EstimatedBatchNorm,
    EvoNorm,
    L1BatchNorm,
    MembranePotentialBatchNorm,
    RegionNorm,
    tasks_of,
)
from tests.model.parts import uneven_batch

C = 4


class OfRegions(nn.Module):
    """Region normalisation, with a mask of x."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RegionNorm(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, (x.detach()[:, :1] > 0).to(x.dtype))


class OfTasks(nn.Module):
    """Balanced batch norm, with tasks of x."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = BalancedBatchNorm(C, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, (x.detach()[:, 0, 0] > 0).long())


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "evo": partial(EvoNorm, C),
    "l1": partial(L1BatchNorm, C),
    "membrane": partial(MembranePotentialBatchNorm, C),
    "estimated": partial(EstimatedBatchNorm, C),
    "batch_channel": partial(BatchChannelNorm, C),
    "estimated_channel": partial(BatchChannelNorm, C, estimate=True),
    "balanced": OfTasks,
    "region": OfRegions,
}
KINDS = {
    "l1": ["sums", "sums", "gradients", "gradients"],
    "evo": ["sums", "gradients"],
    "balanced": ["sums", "gradients"],
    "estimated": ["moments"],
    "estimated_channel": ["moments"],
}


def repeated(function: Callable[[Tensor], Tensor], is_reentrant: bool = False) -> Any:
    return partial(checkpoint, function, use_reentrant=is_reentrant)


def steps(
    name: str,
    around: Callable[[nn.Module], Callable[[Tensor], Tensor]],
    forwards: int = 1,
) -> tuple[list[Tensor], list[str]]:
    """Take steps of several forwards, then one backward pass: what they leave, and the messages."""
    layer = LAYERS[name]().double()
    function, left = around(layer), []
    with exchange.record() as made:
        for step in range(2):
            seeds = [10 * step + 3 * i + dist.get_rank() for i in range(forwards)]
            xs = [(1 + i) * uneven_batch(4, seed, C) for i, seed in enumerate(seeds)]
            xs = [x.requires_grad_() for x in xs]
            loss = sum((function(x).sin() * uneven_batch(4, 7, C)).sum() for x in xs)
            assert isinstance(loss, Tensor)
            loss.backward()
            left += [x.grad for x in xs]
    left += [*(p.grad for p in layer.parameters()), *layer.state_dict().values()]
    return left, [each.kind for each in made]


def alone(name: str, kind: str) -> tuple[list[Tensor], list[str]]:
    """Steps in which rank 1 alone repeats its forwards, perhaps of compiled code."""
    is_repeated = kind != "plain" and (dist.get_rank() == 1 or kind.startswith("compiled"))

    def around(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        compiled = torch.compile(layer, backend="eager") if "compiled" in kind else layer
        return repeated(compiled, "reentrant" in kind) if is_repeated else compiled

    return steps(name, around, forwards=1 if "compiled" in kind else 2)


def compare(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["alone", "alone, reentrant"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_worker_may_repeat_alone_and_exchanges_nothing(pool, name, kind):
    """Two forwards await each backward pass."""
    plain = pool(2).run(alone, name, "plain")
    forward, backward = [
        [each for each in KINDS.get(name, ["moments", "gradients"]) if (each == "gradients") == is_]
        for is_ in (False, True)
    ]
    for got, expected in zip(pool(2).run(alone, name, kind), plain, strict=True):
        compare(got[0], expected[0])
        assert got[1] == expected[1] == (2 * forward + 2 * backward) * 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "compiled") for name in LAYERS),
        *((name, "compiled, reentrant") for name in ("l1", "estimated", "region")),
    ],
)
def test_compiled_code_within_a_checkpoint(pool, name, kind):
    plain = pool(2).run(one_forward, name)
    for got, expected in zip(pool(2).run(alone, name, kind), plain, strict=True):
        compare(got[0], expected[0])
        assert got[1] == expected[1]


def one_forward(name: str) -> tuple[list[Tensor], list[str]]:
    return steps(name, lambda layer: layer)


@pytest.mark.parametrize("is_repeated", [False, True])
def test_a_forward_is_repeated_with_its_tasks_when_their_block_is_over(is_repeated):
    x, tasks = uneven_batch(6, 0, C), torch.tensor([0, 1, 1, 0, 1, 1])
    grads = []
    for is_within in (True, False):
        layer = BalancedBatchNorm(C, 2).double()
        leaf = x.clone().requires_grad_()
        with tasks_of(layer, tasks):
            y = repeated(layer)(leaf) if is_repeated else layer(leaf)
            loss = y.sin().sum() + layer.balance_loss()
            if is_within:
                loss.backward()
        if not is_within:
            loss.backward()
        grads += [leaf.grad, layer.psi.grad]
    compare(grads[:2], grads[2:])
    assert grads[1].abs().min() > 1e-6


def test_the_loss_of_the_last_batch_is_not_that_of_a_repeated_one():
    layer = BalancedBatchNorm(C).double()
    first = repeated(layer)(uneven_batch(4, 0, C).requires_grad_())
    layer(uneven_batch(4, 1, C))
    expected = layer.balance_loss()
    first.sin().sum().backward()
    assert torch.equal(layer.balance_loss(), expected)


def test_a_loss_without_a_gradient_is_refused():
    layer = BalancedBatchNorm(C)
    repeated(layer, is_reentrant=True)(torch.randn(4, C, requires_grad=True))
    with pytest.raises(InputError, match=r"`balance_loss` must follow .* a re-entrant checkpoint"):
        layer.balance_loss()
    with torch.no_grad():
        assert layer.balance_loss().isfinite()


def forward_meets_backward() -> str:
    """Rank 0 makes a second forward while rank 1 goes back."""
    layer = BalancedBatchNorm(C)
    y = layer(torch.randn(4, C))
    try:
        layer(torch.randn(4, C)) if dist.get_rank() == 0 else y.sum().backward()
    except ExchangeError as error:
        return str(error)
    return "nothing was raised"


def test_a_forward_does_not_meet_another_workers_backward_pass(pool):
    for said in pool(2).run(forward_meets_backward):
        assert "(sums, 10 float64" in said
        assert "(backward, gradients, 10 float64" in said
