"""Selective activation checkpointing: it sees no operator of a layer, so no bit changes."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from syncnorm import RenormSchedule, SyncBatchNorm, SyncBatchRenorm, accumulate, prepare_ddp
from syncnorm.family import (
    METHODS,
    BalancedBatchNorm,
    EvoNorm,
    MembranePotentialBatchNorm,
    RegionNorm,
)
from syncnorm.functional import sync_batch_norm
from tests.model.parts import selective_contexts, uneven_batch


class Function(nn.Module):
    """The function of a layer, with buffers."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in {"mean": torch.zeros(6), "var": torch.ones(6)}.items():
            self.register_buffer(name, value)
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return sync_batch_norm(x, self.mean, self.var, num_batches_tracked=self.clock)


class Positive(RegionNorm):
    """Normalises what is positive in the first channel, and the rest."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x[:, :1] > 0)


BOUNDS = RenormSchedule.constant(1.5, 0.5)
SELECTIVE = {
    **{
        f"norm {sync}": functools.partial(SyncBatchNorm, sync=sync)
        for sync in ("batch", "none", "running", "lagged")
    },
    **{
        f"renorm {sync}": functools.partial(SyncBatchRenorm, sync=sync, schedule=BOUNDS)
        for sync in ("batch", "none", "running", "lagged")
    },
    "function": lambda channels: Function(),
    **METHODS,
    "evonorm": EvoNorm,
    "balanced": BalancedBatchNorm,
    "membrane": MembranePotentialBatchNorm,
    "region": Positive,
}


def _selectively_checkpointed(
    make: str, is_checkpointed: bool, is_compiled: bool = False, accumulates: bool = False
) -> list[Tensor]:
    """Gradients and buffers."""
    torch.manual_seed(0)
    parts = nn.Conv1d(4, 6, 3, padding=1), SELECTIVE[make](6), nn.Tanh()
    model = prepare_ddp(nn.Sequential(*parts).double())
    forward = torch.compile(model, backend="aot_eager") if is_compiled else model
    for step in range(3):
        x = uneven_batch(4, step + 10 * dist.get_rank()).requires_grad_()
        with accumulate(model) if accumulates else contextlib.nullcontext():
            if is_checkpointed:
                y = checkpoint(forward, x, use_reentrant=False, context_fn=selective_contexts)
                assert isinstance(y, Tensor)
            else:
                y = forward(x)
            y.square().mean().backward()
    return [x.grad, *(p.grad for p in model.parameters()), *model.state_dict().values()]


@pytest.mark.parametrize("make", SELECTIVE)
def test_selective_checkpoints_see_nothing_of_a_layer(pool, make):
    """They would give what the exchange was given for what the repetition asks for."""
    plain = pool(2).run(_selectively_checkpointed, make, False)
    for got, expected in zip(
        pool(2).run(_selectively_checkpointed, make, True), plain, strict=True
    ):
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "accumulates"),
    [
        *((name, False) for name in SELECTIVE if not name.endswith(("batch", "none", "function"))),
        ("norm batch", True),
        ("renorm lagged", True),
    ],
)
def test_selective_checkpoints_around_compiled_code_see_nothing_of_layers_beside_it(
    pool, make, accumulates
):
    plain = pool(2).run(_selectively_checkpointed, make, False, False, accumulates)
    for got, expected in zip(
        pool(2).run(_selectively_checkpointed, make, True, True, accumulates), plain, strict=True
    ):
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
